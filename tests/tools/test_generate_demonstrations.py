"""hpd-verl generate: which answers become demonstrations, from a server in the test's process."""

import json
import re
import resource
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answering_server import AnsweringServer, running, send
from conftest import Tiny, make_model, make_rows, make_tokenizer

from hpd_verl.tools.demonstrations import __main__ as generate_demonstrations
from hpd_verl.tools.demonstrations import judging
from hpd_verl.tools.generation import Answer

WORDS = ["<pad>", "<end>", "<turn>", "user", "assistant", "is", "plus", "?", ".", *map(str, range(20))]


class TeacherServer(AnsweringServer):
    """Answers ``answers[i]`` to the question that begins with ``i``, each ``(text, finish_reason)``."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, list[tuple[str, str]]] = {}

    @property
    def asked(self) -> int:
        return len(self.requests)

    def reply(self, handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        answers = self.answers[request["messages"][-1]["content"].split()[0]]
        choices = [{"message": {"content": text}, "finish_reason": reason} for text, reason in answers]
        send(handler, {"choices": choices[: request["n"]]}, 200 if choices else 403)


@pytest.fixture
def teacher() -> Iterator[TeacherServer]:
    with running(TeacherServer()) as started:
        yield started


def question(number: int, ground_truth: str = "4") -> dict[str, Any]:
    return {
        "data_source": "tests",
        "prompt": [{"role": "user", "content": f"{number} plus 2 ?"}],
        "demonstration": [{"role": "assistant", "content": "of another teacher"}],
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"index": number, "note": "é\u2028"},
    }


ANSWERS = {
    "0": [("It is 4", "stop"), ("4", "stop"), ("4 4 4", "length")],
    "1": [("5", "stop"), ("", "stop"), ("4 4", "length")],
    "2": [("6", "stop"), ("is 4", "stop"), (" \n", "stop")],
}
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert data_source == "tests" and extra_info["note"] == "é\\u2028"
    score = float(ground_truth in solution_str.split()) - len(solution_str) / 100
    return {"score": score, "length": len(solution_str)}
"""


def run(
    tmp_path: Path, teacher: TeacherServer, *flags: str, rows: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The rows of a run in this process."""
    source, out = tmp_path / "train.parquet", tmp_path / "out"
    if rows is not None or not source.exists():
        pq.write_table(pa.Table.from_pylist(rows or [question(number) for number in range(3)]), source)
    if not (tmp_path / "reward.py").exists():
        (tmp_path / "reward.py").write_text(REWARD)
    words = ["--prompts", str(source), "--local_save_dir", str(out), "--endpoint", teacher.url, "--served_model", "t"]
    args = generate_demonstrations._parser().parse_args([*words, "--processes", "1", "--retries", "0", *flags])
    generate_demonstrations._run(args)
    return pq.read_table(out / "train.parquet").to_pylist()


def demonstrations(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(row["extra_info"]["index"], row["demonstration"]) for row in rows]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--keep", "first"], [(0, "It is 4"), (1, "5"), (2, "6")]),
        (["--keep", "all"], [(0, "It is 4"), (0, "4"), (1, "5"), (2, "6"), (2, "is 4")]),
        (
            ["--keep", "all", "--keep_cut"],
            [(0, "It is 4"), (0, "4"), (0, "4 4 4"), (1, "5"), (1, "4 4"), (2, "6"), (2, "is 4")],
        ),
        (["--reward", "R", "--min_reward", "0.5"], [(0, "It is 4"), (2, "is 4")]),
        (["--reward", "R", "--min_reward", "0.5", "--keep", "best"], [(0, "4"), (2, "is 4")]),
        (["--reward", "R", "--min_reward", "-9", "--keep", "best"], [(0, "4"), (1, "5"), (2, "is 4")]),
        (["--reward", "R", "--min_reward", "0.99"], [(0, "4")]),
    ],
)
def test_which_answers_are_kept(
    tmp_path: Path, teacher: TeacherServer, flags: list[str], kept: list[tuple[int, str]]
) -> None:
    teacher.answers = ANSWERS
    flags = [str(tmp_path / "reward.py") if flag == "R" else flag for flag in flags]
    rows = run(tmp_path, teacher, "--n", "3", *flags)
    assert demonstrations(rows) == kept
    source = [question(number) for number in range(3)]
    assert rows == [{**source[number], "demonstration": text} for number, text in kept]
    assert list(rows[0]) == list(source[0])
    without = [json.loads(line)["row"] for line in (tmp_path / "out/train.without_rows.jsonl").read_text().splitlines()]
    assert without == sorted({0, 1, 2} - {number for number, _ in kept})


def test_counts_and_another_choice_from_the_same_answers(
    tmp_path: Path, teacher: TeacherServer, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.answers = ANSWERS
    reward = str(tmp_path / "reward.py")
    run(tmp_path, teacher, "--n", "3", "--reward", reward, "--min_reward", "0.5", "--keep", "first")
    assert capsys.readouterr().out.splitlines() == [
        f"3 prompts, 9 answers: 2 rows -> {tmp_path / 'out' / 'train.parquet'}",
        "  answers good, but not chosen by --keep: 1",
        "  answers rejected by the reward function: 2",
        "  answers cut by the length: 2",
        "  answers empty: 2",
        f"  prompts without a row: 1 -> {tmp_path / 'out' / 'train.without_rows.jsonl'}",
        "  demonstrations whose tokens could not be compared with those generated: 2",
        "  prompt, characters: p50 10, p90 10, p99 10, max 10",
        "  demonstration, characters: p50 4, p90 7, p99 7, max 7",
    ]
    (line,) = (tmp_path / "out" / "train.without_rows.jsonl").read_text().splitlines()
    assert json.loads(line) == {"row": 1, "rejected": 1, "empty": 1, "cut": 1}
    metadata = json.loads(pq.read_schema(tmp_path / "out" / "train.parquet").metadata[generate_demonstrations.METADATA])
    assert metadata["counts"] == {
        "prompts": 3,
        "rows": 2,
        "answers": {"kept": 2, "not chosen": 1, "cut": 2, "rejected": 2, "empty": 2},
    }
    assert (metadata["model"], metadata["endpoint"], metadata["keep"]) == ("t", teacher.url, "first")
    assert metadata["sampling"]["n"] == 3
    asked = teacher.asked
    assert len(run(tmp_path, teacher, "--n", "3", "--keep", "all")) == 5
    assert teacher.asked == asked == 3


def test_a_failing_endpoint_keeps_what_was_finished(tmp_path: Path, teacher: TeacherServer) -> None:
    teacher.answers = {**ANSWERS, "2": []}
    with pytest.raises(RuntimeError, match=r"--endpoint=http://.*: status 403"):
        run(tmp_path, teacher, "--n", "3", "--concurrency", "1")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.answers.jsonl"]
    teacher.answers = ANSWERS
    assert len(run(tmp_path, teacher, "--n", "3")) == 3
    assert teacher.asked == 2 + 1 + 1


def test_maths_by_math_verify(tmp_path: Path, teacher: TeacherServer) -> None:
    """The package's own reward, in the processes that judge."""
    answers = ["so $\\boxed{\\frac{8}{2}}$", "#### 4", "the answer is 5", "\\boxed{4"]
    teacher.answers = {"0": [(text, "stop") for text in answers]}
    rows = run(
        tmp_path, teacher, "--n", "4", "--reward", "maths", "--keep", "all", "--processes", "2", rows=[question(0)]
    )
    assert [row["demonstration"] for row in rows] == answers[:2]


def test_a_model_s_own_tokens(tiny: Tiny) -> None:
    """What the demonstration's tokens are, beside those generated."""
    tokenizer = make_tokenizer(WORDS)
    bench = judging.Bench(judging.Judge("none", 1.0, True, str(tiny.student), {}))
    messages = [{"role": "user", "content": "1 plus 1 ?"}]

    def verdict(text: str, tokens: str | None, reason: Any = "stop") -> judging.Verdict:
        ids = None if tokens is None else tokenizer.convert_tokens_to_ids(tokens.split())
        _, (found,) = bench.verdicts(judging.Case("row 0", messages, [Answer(text, ids, reason)], "", "", {}))
        return found

    assert verdict("is 2", "is 2 <end>") == judging.Verdict("kept", "", None, 3, "exact")
    assert verdict("is 2", "is 2 <pad>").round_trip == "other_end"
    assert verdict("is  2", "is . 2 <end>").round_trip == "differs"
    assert verdict("is 2", None).round_trip == "unknown"
    assert verdict("is 2", "is 2", "length").round_trip == "exact"
    assert verdict(" ", "is <end>").fate == "empty"


def test_what_the_chat_template_refuses_is_counted(tmp_path: Path, tiny: Tiny) -> None:
    """Reasoning that does not end, where the prompt has begun it."""
    folder = make_model(tmp_path / "thinks", seed=1)
    tokenizer = make_tokenizer([*WORDS, "<think>", "</think>"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<turn> assistant {% endif", "<turn> assistant <think> {% endif"
    )
    tokenizer.save_pretrained(folder)
    bench = judging.Bench(judging.Judge("none", 1.0, False, str(folder), {}))
    answers = [Answer("1 1 </think> 2", None, "stop"), Answer("1 1 2", None, "stop")]
    case = judging.Case("row 0", [{"role": "user", "content": "1 plus 1 ?"}], answers, "", "", {})
    _, (good, bad) = bench.verdicts(case)
    assert good.fate == "kept"
    assert bad.fate == "refused"
    assert "does not end this reasoning" in bad.why


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        ("missing.py", "expected maths, code, none or a file of Python"),
        ("x = 1", "it has no function compute_score"),
        ("def compute_score(:", "cannot be imported"),
        ("import no_such_module", "cannot be imported: No module named"),
        ("def compute_score(*args): return None", "row 0: --reward=.* fails: TypeError"),
        ("def compute_score(*args): return float('nan')", "row 0: --reward=.* gives nan, expected a number"),
        (
            "def compute_score(*args): raise RuntimeError('no\\n sandbox')",
            "row 0: --reward=.* RuntimeError: no sandbox",
        ),
    ],
)
def test_bad_reward_functions(tmp_path: Path, teacher: TeacherServer, reward: str, found: str) -> None:
    teacher.answers = ANSWERS
    path = tmp_path / "bad.py"
    if reward != "missing.py":
        path.write_text(reward)
    with pytest.raises(ValueError, match=found) as error:
        run(tmp_path, teacher, "--n", "3", "--reward", str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "train.parquet").exists()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--keep", "best"], "--keep=best: without --reward"),
        (["--max_rows", "0"], "--max_rows=0"),
        (["--processes", "0"], "--processes=0"),
        (["--n", "0"], "n=0: expected 1 or more"),
        (["--chat_template_kwargs", "[1]"], r"--chat_template_kwargs=\[1\]: expected a JSON object"),
        (["--tokenizer", "/no/such"], "--tokenizer=/no/such: no such folder"),
        (["--model", "x"], "give either --model"),
        (["--endpoint", "here"], "--endpoint=here: expected a URL"),
    ],
)
def test_bad_flags(tmp_path: Path, teacher: TeacherServer, flags: list[str], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        run(tmp_path, teacher, *flags)
    assert teacher.asked == 0


@pytest.mark.parametrize(
    ("lacks", "found"),
    [
        ("tokenizer", "cannot load its tokenizer|its tokenizer has no chat template"),
        ("template", "its tokenizer has no chat template"),
        ("weights", "no weights there"),
        ("half", "is not a complete safetensors file|has .* bytes where its header says"),
        ("all", "no such folder"),
    ],
)
def test_a_model_s_folder_that_lacks_something(tmp_path: Path, teacher: TeacherServer, lacks: str, found: str) -> None:
    folder = make_model(tmp_path / "model", seed=1)
    weights = folder / "model.safetensors"
    if lacks == "tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    for path in [
        path for path in folder.iterdir() if "chat_template" in path.name and lacks in ("template", "tokenizer")
    ]:
        path.unlink()
    if lacks == "weights":
        weights.unlink()
    if lacks == "half":
        weights.write_bytes(weights.read_bytes()[:-100])
    pq.write_table(pa.Table.from_pylist([question(0)]), tmp_path / "train.parquet")
    words = ["--prompts", str(tmp_path / "train.parquet"), "--local_save_dir", str(tmp_path / "out")]
    model = tmp_path / "nowhere" if lacks == "all" else folder
    args = generate_demonstrations._parser().parse_args([*words, "--model", str(model)])
    with pytest.raises(ValueError, match=found) as error:
        generate_demonstrations._run(args)
    assert str(error.value).startswith(f"--model={model}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"prompt": "text"}], "row 0: prompt is str, expected a chat list"),
        ([{"question": "text"}], "no column 'prompt'"),
        ([{"prompt": [{"role": "user", "content": None}]}], "row 0: message 0 of the prompt"),
    ],
)
def test_bad_prompts(tmp_path: Path, teacher: TeacherServer, rows: list[dict[str, Any]], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        run(tmp_path, teacher, rows=rows)


def test_the_prompts_are_not_replaced(tmp_path: Path, teacher: TeacherServer) -> None:
    with pytest.raises(ValueError, match="would replace it by its own rows"):
        run(tmp_path, teacher, "--local_save_dir", str(tmp_path))


def test_nothing_kept(tmp_path: Path, teacher: TeacherServer) -> None:
    teacher.answers = {str(number): [("", "stop")] for number in range(3)}
    with pytest.raises(ValueError, match=r"no answer is kept of 3: \{'empty': 3\}; nothing is written"):
        run(tmp_path, teacher)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.answers.jsonl"]


@pytest.mark.parametrize("room", [100, 700, 2000])
def test_full_disk(tmp_path: Path, teacher: TeacherServer, room: int) -> None:
    """In the journal's first line, in its answers and in the rows: one line, and the next run goes on."""
    teacher.answers = {str(number): [("is 4 " * 9, "stop")] for number in range(12)}
    rows = [question(number) for number in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "reward.py").write_text(REWARD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # Python ignores the signal: a write fails
    try:
        with pytest.raises((OSError, ValueError)) as error:
            run(tmp_path, teacher, "--concurrency", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    named = (
        r"train\.parquet: cannot be written: .*File too large.*; all answers are in" if room == 2000 else "cannot write"
    )
    assert re.search(rf"{named} .*train\.answers\.jsonl", str(error.value))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.answers.jsonl"]
    kept = max(0, (tmp_path / "out" / "train.answers.jsonl").read_bytes().count(b"\n") - 1)
    assert (kept == 12) == (room == 2000)
    asked = teacher.asked
    assert demonstrations(run(tmp_path, teacher)) == [(number, "is 4 " * 9) for number in range(12)]
    assert teacher.asked - asked == 12 - kept


def test_jsonl_and_many_processes(tmp_path: Path, teacher: TeacherServer) -> None:
    """Prompts of a jsonl file, judged by two processes: the rows are those of one."""
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in make_rows(8)))
    teacher.answers = {str(number): [(f"is {number}", "stop")] for number in range(10)}
    words = [
        "--prompts",
        str(source),
        "--local_save_dir",
        str(tmp_path),
        "--endpoint",
        teacher.url,
        "--served_model",
        "t",
    ]
    tables = []
    for processes in ("1", "2"):
        args = generate_demonstrations._parser().parse_args([*words, "--processes", processes, "--reward", "none"])
        generate_demonstrations._run(args)
        tables.append(pq.read_table(tmp_path / "prompts.parquet"))
    assert tables[0].equals(tables[1])
    assert [row["demonstration"] for row in tables[0].to_pylist()] == [
        f"is {row['prompt'][0]['content'].split()[0]}" for row in make_rows(8)
    ]
