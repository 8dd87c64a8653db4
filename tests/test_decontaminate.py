"""data_prep.decontaminate: what overlaps is found and told, what prompts share is no overlap."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # data_prep is no part of the installed package

from data_prep import decontaminate  # noqa: E402

INSTRUCTION = "Please reason step by step, show all of your work, and put your final answer within \\boxed{}."
LONG = "Seven brave sailors crossed the wide ocean with twelve barrels of fresh water and nine sheep"
STARTS = ["how", "what", "who", "when", "why"]
FILLER = [f"{STARTS[number % 5]} {chr(97 + number)}{number} and topic{number} or thing{number}" for number in range(20)]


def row(problem: str, demonstration: str = "It is 4.", **extra_info: Any) -> dict[str, Any]:
    prompt = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": problem}]
    return {"prompt": prompt, "demonstration": demonstration, "extra_info": {"split": "train", **extra_info}}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"made": "by hand"}), path)
    return path


def decontaminated(
    tmp_path: Path, train: list[dict[str, Any]], test: list[dict[str, Any]], *flags: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that stay, and the report."""
    files = write(tmp_path / "train.parquet", train), write(tmp_path / "test.parquet", test)
    args = decontaminate._parser().parse_args(
        ["--train", str(files[0]), "--test", str(files[1]), "--local_save_dir", str(tmp_path / "out"), *flags]
    )
    decontaminate._run(args)
    report = json.loads((tmp_path / "out" / "train.overlap.json").read_text())
    written = tmp_path / "out" / "train.parquet"
    return pq.read_table(written).to_pylist() if written.exists() else [], report


def matches(tmp_path: Path, train: str, test: str, *flags: str) -> list[dict[str, Any]]:
    rows = [row(train), row("another problem altogether")]
    _, report = decontaminated(tmp_path, rows, [row(test)], *flags)
    return [match for entry in report["left_out"] for match in entry["matches"]]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("What is 2 + 2?", "what is  2+2"),
        ("Cost: $1,000,000!", "COST 1000000"),
        ("x² \uff0b \uff11 = ½", "x2 + 1 = 1\u20442"),
        ("A 12-year-old's “dog”", "a 12 year old s dog"),
        ("ΑΣ Straße", "ας strasse"),
        ("求 3 的平方。", "求3的平方"),
    ],
)
def test_the_same_problem_in_another_form(tmp_path: Path, train: str, test: str) -> None:
    (match,) = matches(tmp_path, train, test)
    assert match["kind"] == "exact"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("What is 2 + 2?", "What is 2 - 2?"),
        ("What is 2 / 2?", "What is 2 * 2?"),
        ("Is x < 3?", "Is x > 3?"),
        ("What is 3 - 4?", "What is 3 4?"),
        ("1,000", "1,00"),
        (" ".join(LONG.split()[:12]) + " and then", " ".join(LONG.split()[:12]) + " but now"),
        ("?!", "!!"),
        ("f of 1 2 3 4 5 6 7 8 9 10 11 12 13", "g of 1 2 3 4 5 6 7 8 9 10 11 12 13"),
    ],
)
def test_another_problem(tmp_path: Path, train: str, test: str) -> None:
    assert matches(tmp_path, train, test) == []


def test_runs_of_words_and_both_rows_numbers(tmp_path: Path) -> None:
    inner = "crossed the wide ocean with twelve barrels of fresh water and nine sheep"  # 13 words
    test = [row("first"), row(f"{LONG}. How many goats?"), row("x"), row("y")]
    train = [*map(row, FILLER), row(f"Two men {inner} of gold"), row("x"), row("x y z")]
    rows, report = decontaminated(tmp_path, train, test)
    assert rows == [*train[:20], train[-1]]
    file = str(tmp_path / "test.parquet")
    common = {"test": file, "test_column": "prompt", "column": "prompt"}
    assert report["left_out"] == [
        {"row": 20, "matches": [{**common, "test_row": 1, "kind": "ngram", "text": inner}]},
        {"row": 21, "matches": [{**common, "test_row": 2, "kind": "exact", "text": "x"}]},
    ]
    assert report["rows"], report["rows_that_overlap"] == (23, 2)
    assert report["tests"] == [
        {"test": file, "rows": 4, "rows_that_overlap": 2, "train_rows_exact": 1, "train_rows_ngram": 1}
    ]
    assert pq.read_schema(tmp_path / "out" / "train.parquet").metadata[b"made"] == b"by hand"
    assert decontaminated(tmp_path, train, test, "--ngram", "14")[0] == [*train[:21], train[-1]]


@pytest.mark.parametrize(
    "written",
    ["{problem} {instruction}", "{instruction}\n{problem}", "{problem} {instruction}\nassert f() == {problem}"],
)
def test_a_shared_instruction_is_no_overlap(tmp_path: Path, written: str) -> None:
    """Before, after and in the middle; the same problem is found, whatever instruction the other file has."""
    train = [row(written.format(problem=problem, instruction=INSTRUCTION)) for problem in FILLER]
    other = [row(written.format(problem=f"other {problem[::-1]}", instruction=INSTRUCTION)) for problem in FILLER]
    rows, report = decontaminated(tmp_path, train, other)
    assert rows == train
    assert "please reason step by step" in report["shared_by_many_prompts"]
    rows, report = decontaminated(tmp_path, train, [*other, row(FILLER[3]), other[0]])
    if "assert" not in written:
        assert [entry["row"] for entry in report["left_out"]] == [3]
    rows, report = decontaminated(tmp_path, train, [train[5], *other])
    assert [entry["row"] for entry in report["left_out"]] == [5]
    assert report["left_out"][0]["matches"][0]["test_row"] == 0


def test_many_answers_to_few_prompts_share_nothing(tmp_path: Path) -> None:
    """A problem that many rows have is no instruction."""
    train = [row(problem) for problem in (f"{LONG} one", *FILLER[:12]) for _ in range(8)]
    rows, report = decontaminated(tmp_path, train, [row(f"{LONG} one")])
    assert [entry["row"] for entry in report["left_out"]] == list(range(8))
    assert len(rows) == 12 * 8


def test_the_question_alone_where_it_is_there(tmp_path: Path) -> None:
    train = [row(f"{LONG} {number}", question=f"question {number}") for number in range(3)]
    rows, _ = decontaminated(tmp_path, train, [row(LONG, question="Question 1?")])
    assert rows == [train[0], train[2]]


def test_demonstrations_by_runs_only(tmp_path: Path) -> None:
    train = [row("one", "It is 4."), row("two", f"As we know: {LONG}!"), row("three", "5")]
    test = [row("four", "It is 4."), row(LONG, "6")]
    assert decontaminated(tmp_path, train, test)[1]["left_out"] == []
    rows, report = decontaminated(tmp_path, train, test, "--columns", "prompt,demonstration")
    assert rows == [train[0], train[2]]
    (match,) = report["left_out"][0]["matches"]
    assert (match["column"], match["test_column"], match["test_row"]) == ("demonstration", "prompt", 1)
    assert match["text"] == LONG.lower()


def test_report_only(tmp_path: Path) -> None:
    rows, report = decontaminated(tmp_path, [row("x"), row("y")], [row("x")], "--report_only")
    assert rows == []
    assert len(report["left_out"]) == 1
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.overlap.json"]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.decontaminate", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("train", "test", "flags", "found"),
    [
        ([row("x")], [row("x")], [], "all 1 rows overlap, none is written"),
        ([row("x")], [{"a": 1}], [], "row 1: no extra_info.question, prompt, question or problem; there are a"),
        ([{"a": 1}], [row("x")], [], "train.parquet, row 1: no extra_info.question"),
        ([row("x")], None, [], "test.parquet: no such file"),
        ([row("x")], [row("y")], ["--ngram", "1"], "--ngram=1: expected 2 or more"),
        ([row("x")], [row("y")], ["--columns", "answer"], "--columns=answer: expected prompt, demonstration"),
    ],
)
def test_bad_input_in_one_line(
    tmp_path: Path, train: list[dict[str, Any]], test: list[dict[str, Any]] | None, flags: list[str], found: str
) -> None:
    write(tmp_path / "train.parquet", train)
    if test is not None:
        write(tmp_path / "test.parquet", test)
    paths = ["--train", str(tmp_path / "train.parquet"), "--test", str(tmp_path / "test.parquet")]
    result = run(*paths, "--local_save_dir", str(tmp_path / "out"), *flags)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert found in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "train.parquet").exists()


def test_the_file_itself_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row("x"), row("y")])
    path = str(tmp_path / "train.parquet")
    result = run("--train", path, "--test", path, "--local_save_dir", str(tmp_path))
    assert "would be replaced; choose another folder" in result.stderr


def test_memory_does_not_grow_with_the_training_file(tmp_path: Path) -> None:
    peaks = []
    for count in (3_000, 12_000):
        train = [row(f"thing {number} of {number * 7} and {number * 13} in {number % 11}") for number in range(count)]
        write(tmp_path / "train.parquet", train)
        del train
        write(tmp_path / "test.parquet", [row(LONG)])
        flags = ["--train", str(tmp_path / "train.parquet"), "--test", str(tmp_path / "test.parquet")]
        args = decontaminate._parser().parse_args([*flags, "--local_save_dir", str(tmp_path / "out")])
        tracemalloc.start()
        decontaminate._run(args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 12_000 * 150, "no more than a hash a row"
