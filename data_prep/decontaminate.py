"""Removes training rows that overlap with test sets, and reports each of them.

A row overlaps if its problem equals a test problem or shares --ngram consecutive words with one, half of them with
letters; shorter problems are compared whole. From the root of the checkout:

    python -m data_prep.decontaminate --train data/train.parquet --test aime24/test.parquet math500/test.parquet \\
        --local_save_dir data/clean

The problem is extra_info.question, if present, else the prompt without its system message. Case, punctuation and
variants of a character are ignored, and so are instructions: runs of 5 words in a tenth of a file's prompts.

Writes the remaining rows under the file's name, and NAME.overlap.json: counts, and for each removed row both row
numbers, from 0, and the shared words.
"""

import argparse
import json
import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.rows import ROWS_PER_GROUP
from data_prep.sources import PIECE, Source, read
from hpd_verl.tools.rows import unfinished

logger = logging.getLogger("data_prep")

SHARED_WORDS = 5
"""Length of the runs of words by which an instruction is known."""
SHARED_BY = 0.1
"""Share of a file's prompts that have such a run."""
SAMPLE = 1000
"""Prompts of a file, drawn, that are looked at for it."""
ENDS = 500
"""Words at either end of a prompt that are looked at for it."""
FEWEST = 10
"""Prompts below which a file cannot show what its prompts share."""

_CJK = "぀-ヿ㐀-鿿가-힯"
_WORD = re.compile(
    rf"[{_CJK}]"  # scripts without spaces: each character
    rf"|[^\W{_CJK}]+"
    r"|[+*/%^=<>]"
    r"|(?<![^\W\d_]{2})-(?![^\W\d_]{2})"  # a minus, no hyphen
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

Words = list[str]


def words_of(text: str) -> Words:
    """The words of a text, in one form: NFKC, no case, punctuation or thousands separators; operators are words."""
    return _WORD.findall(_THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold()))


def problem_of(record: dict[str, Any]) -> str:
    """The problem's text of a row, or of a record of a public set.

    Raises:
        ValueError: there is none.
    """
    extra = record.get("extra_info")
    question = extra.get("question") if isinstance(extra, dict) else None
    if isinstance(question, str) and question.strip():
        return question
    prompt = record.get("prompt")
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        texts = [turn.get("content") for turn in prompt if turn.get("role") != "system"]
        if texts and all(isinstance(text, str) for text in texts):
            return "\n".join(map(str, texts))
    for key in ("question", "problem", "prompt"):
        if isinstance(record.get(key), str):
            return str(record[key])
    raise ValueError(f"no extra_info.question, prompt, question or problem; there are {', '.join(record) or 'none'}")


def demonstration_of(record: dict[str, Any]) -> str:
    """The demonstration's text; "" if there is none."""
    value = record.get("demonstration")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) else ""


TEXTS = {"prompt": problem_of, "demonstration": demonstration_of}
"""``--columns``: from a row to the text that is compared."""


def runs(words: Sequence[str], length: int) -> Iterator[str]:
    """All runs of so many words."""
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


def is_text(run: str) -> bool:
    """Whether half of a run's words hold letters: lists of numbers are the same by chance."""
    words = run.split(" ")
    return 2 * sum(any(map(str.isalpha, word)) for word in words) >= len(words)


def shared_runs(texts: Iterable[Words]) -> set[str]:
    """Runs of ``SHARED_WORDS`` words that many of these texts share; none if there are few texts."""
    generator, seen = random.Random(0), set()
    sample: list[Words] = []
    for words in texts:
        key = hash(tuple(words))
        if key in seen:
            continue
        seen.add(key)
        words = words if len(words) <= 2 * ENDS else [*words[:ENDS], *words[-ENDS:]]
        if len(sample) < SAMPLE:
            sample.append(words)
        elif (place := generator.randrange(len(seen))) < SAMPLE:
            sample[place] = words
    if len(sample) < FEWEST:
        return set()
    counts = Counter(run for words in sample for run in set(runs(words, SHARED_WORDS)))
    shared = {run: count for run, count in counts.items() if count >= max(2, SHARED_BY * len(sample))}
    # Many problems beside an instruction begin or end alike; their words are not its own, as fewer prompts have them.
    beside: Counter[str] = Counter()
    for run, count in shared.items():
        first, last = run.split(" ", 1)[1], run.rsplit(" ", 1)[0]
        beside[f"> {first}"] = max(beside[f"> {first}"], count)
        beside[f"< {last}"] = max(beside[f"< {last}"], count)
    return {
        run
        for run, count in shared.items()
        if 2 * count > max(beside[f"> {run.rsplit(' ', 1)[0]}"], beside[f"< {run.split(' ', 1)[1]}"])
    }


def parts_of(words: Words, shared: set[str]) -> list[Words]:
    """The text without what is shared: the pieces between."""
    keep = [True] * len(words)
    for start, run in enumerate(runs(words, SHARED_WORDS)):
        if run in shared:
            keep[start : start + SHARED_WORDS] = [False] * SHARED_WORDS
    parts: list[Words] = [[]]
    for word, kept in zip(words, keep, strict=True):
        if kept:
            parts[-1].append(word)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


@dataclass
class Match:
    """The longest run of words that a training row shares with a test set."""

    test: str
    test_row: int
    test_column: str
    column: str
    kind: str
    text: str


@dataclass
class TestSet:
    """One file of test rows, by its problems and their runs of words.

    Attributes:
        name: the file.
        ngram: words of a run.
        rows: how many there are.
        whole: problem without what is shared -> its row.
        grams: run of words -> row and column.
        hits: training rows by kind of overlap.
        overlapping: test rows that a training row overlaps with.
    """

    name: str
    ngram: int
    rows: int = 0
    whole: dict[str, int] = field(default_factory=dict)
    grams: dict[str, tuple[int, str]] = field(default_factory=dict)
    hits: Counter[str] = field(default_factory=Counter)
    overlapping: set[int] = field(default_factory=set)

    def add(self, row: int, column: str, parts: list[Words]) -> None:
        """Take in one text."""
        if column == "prompt":
            self.whole.setdefault(" ".join(word for part in parts for word in part), row)
        for part in parts:
            for gram in filter(is_text, runs(part, self.ngram)):
                self.grams.setdefault(gram, (row, column))

    def match(self, column: str, parts: list[Words]) -> Match | None:
        """The overlap of a text with this set."""
        whole = " ".join(word for part in parts for word in part)
        if column == "prompt" and whole and whole in self.whole:
            return Match(self.name, self.whole[whole], "prompt", column, "exact", whole)
        longest, found = 0, None
        for part in parts:
            start = 0
            while start <= len(part) - self.ngram:
                hit = self.grams.get(" ".join(part[start : start + self.ngram]))
                if hit is None:
                    start += 1
                    continue
                end = start + self.ngram
                while end < len(part) and " ".join(part[end + 1 - self.ngram : end + 1]) in self.grams:
                    end += 1
                if end - start > longest:
                    longest = end - start
                    found = Match(self.name, hit[0], hit[1], column, "ngram", " ".join(part[start:end]))
                start = end - self.ngram + 2
        return found


_ANY = Source("", {"rows": "rows"})


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, with their places.

    Raises:
        ValueError: the file, or the row that cannot be read.
    """
    for where, record in read("rows", _ANY, {"rows": [path]}, ""):
        if isinstance(record, ValueError):
            raise ValueError(f"{where}: {record}")
        yield where, record


def texts_of(path: Path, column: str) -> Iterator[Words]:
    """One column's texts of a file, as words.

    Raises:
        ValueError: a row without a problem, by its place.
    """
    for where, record in records(path):
        try:
            yield words_of(TEXTS[column](record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def index_tests(paths: Sequence[Path], columns: Sequence[str], ngram: int, shared: set[str]) -> list[TestSet]:
    """The test sets, in memory.

    Raises:
        ValueError: a file without rows.
    """
    tests = []
    for path in paths:
        test = TestSet(str(path), ngram)
        for column in columns:
            test.rows = 0
            for row, words in enumerate(texts_of(path, column)):
                test.add(row, column, parts_of(words, shared))
                test.rows = row + 1
        if not test.rows:
            raise ValueError(f"--test {path}: no rows")
        tests.append(test)
    return tests


def matches_of(
    record: dict[str, Any], columns: Sequence[str], tests: Sequence[TestSet], shared: set[str]
) -> list[Match]:
    """The overlap of one training row with each test set."""
    parts = {column: parts_of(words_of(TEXTS[column](record)), shared) for column in columns}
    found = []
    for test in tests:
        of_columns = [match for column in columns if (match := test.match(column, parts[column])) is not None]
        if of_columns:
            found.append(max(of_columns, key=lambda match: (match.kind == "exact", len(match.text))))
    for match in found:
        test = next(test for test in tests if test.name == match.test)
        test.hits[match.kind] += 1
        test.overlapping.add(match.test_row)
    return found


def filter_rows(
    path: Path,
    columns: Sequence[str],
    tests: Sequence[TestSet],
    shared: set[str],
    report: IO[str],
    writer: pq.ParquetWriter | None,
) -> tuple[int, int]:
    """Write the rows that overlap with no test set, and a line of the report for each other row.

    Returns:
        ``(rows read, rows left out)``.
    """
    read_rows = left_out = 0
    with (
        pq.ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as file,
        tqdm(total=file.metadata.num_rows, unit=" rows", disable=None) as bar,
    ):
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
            clean = []
            for record in batch.to_pylist():
                try:
                    found = matches_of(record, columns, tests, shared)
                except ValueError as error:
                    raise ValueError(f"{path}, row {read_rows}: {error}") from error
                clean.append(not found)
                if found:
                    line = json.dumps(
                        {"row": read_rows, "matches": [vars(match) for match in found]}, ensure_ascii=False
                    )
                    report.write((",\n" if left_out else "\n") + line)
                    left_out += 1
                read_rows += 1
            if writer is not None:
                writer.write_batch(batch.filter(pa.array(clean, pa.bool_())))
            bar.update(len(batch))
    return read_rows, left_out


def summary(path: Path, rows: int, left_out: int, tests: Sequence[TestSet]) -> dict[str, Any]:
    """The counts of the report."""
    of_tests = [
        {
            "test": test.name,
            "rows": test.rows,
            "rows_that_overlap": len(test.overlapping),
            "train_rows_exact": test.hits["exact"],
            "train_rows_ngram": test.hits["ngram"],
        }
        for test in tests
    ]
    return {"train": str(path), "rows": rows, "rows_that_overlap": left_out, "tests": of_tests}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="parquet file of rows")
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="parquet or jsonl files of test rows")
    parser.add_argument("--local_save_dir", type=Path, required=True, help="folder for the rows and the report")
    parser.add_argument("--ngram", type=int, default=13, help="consecutive words that count as overlap (%(default)s)")
    parser.add_argument("--columns", default="prompt", help="prompt, or prompt,demonstration (%(default)s)")
    parser.add_argument("--report_only", action="store_true", help="write no rows")
    return parser


def _run(args: argparse.Namespace) -> None:
    columns = args.columns.split(",")
    if not set(columns) <= set(TEXTS) or len(set(columns)) < len(columns):
        raise ValueError(f"--columns={args.columns}: expected prompt, demonstration, or both with a comma")
    if args.ngram < 2:
        raise ValueError(f"--ngram={args.ngram}: expected 2 or more")
    train, out = args.train.expanduser(), args.local_save_dir.expanduser()
    tests = [path.expanduser() for path in args.test]
    for path in (train, *tests):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    if train.suffix != ".parquet":
        raise ValueError(f"--train {train}: expected a parquet file, as the scripts of data_prep write")
    target, report_path = out / train.name, out / f"{train.stem}.overlap.json"
    if target.resolve() in {path.resolve() for path in (train, *tests)} and not args.report_only:
        raise ValueError(f"--local_save_dir {out}: {target} would be replaced; choose another folder")
    shared: set[str] = set()
    for path in (train, *tests):
        for column in columns:
            shared |= shared_runs(texts_of(path, column))
    indexed = index_tests(tests, columns, args.ngram, shared)
    out.mkdir(parents=True, exist_ok=True)
    writer = None
    try:
        with unfinished(report_path).open("w", encoding="utf-8") as report:
            report.write('{"left_out": [')
            if not args.report_only:
                writer = pq.ParquetWriter(unfinished(target), pq.read_schema(train))
            rows, left_out = filter_rows(train, columns, indexed, shared, report, writer)
            counts = summary(train, rows, left_out, indexed)
            settings = {"ngram": args.ngram, "columns": columns, "shared_by_many_prompts": sorted(shared)}
            rest = json.dumps({**counts, **settings}, ensure_ascii=False, indent=1)[1:]
            report.write(f"\n],{rest}\n")
        if writer is not None:
            writer.close()
        unfinished(report_path).replace(report_path)
        if rows == left_out:
            raise ValueError(f"--train {train}: all {rows} rows overlap, none is written; {report_path} says where")
        if writer is not None:
            unfinished(target).replace(target)
    except pa.ArrowException as error:
        raise ValueError(f"{train}: {' '.join(str(error).split())[:300]}") from error
    finally:
        unfinished(report_path).unlink(missing_ok=True)
        unfinished(target).unlink(missing_ok=True)
    for test in counts["tests"]:
        logger.info(
            "%s: %d of %d rows overlap; training rows: %d exactly, %d by a run of %d words",
            *(test[key] for key in ("test", "rows_that_overlap", "rows", "train_rows_exact", "train_rows_ngram")),
            args.ngram,
        )
    where = report_path if args.report_only else target
    logger.info("%s: %d of %d rows overlap, %d stay -> %s", train, left_out, rows, rows - left_out, where)


def main() -> None:
    """The command line.

    Raises:
        SystemExit: a file that cannot be read or written, told in one line.
    """
    args = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
