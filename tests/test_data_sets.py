"""data_prep: one small file a set, in the columns of the sets' cards, through each script's command line."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import running_hub

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # data_prep is no part of the installed package

from data_prep import sources  # noqa: E402

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
R1 = {
    "problem": "1+1?",
    "answer": "2",
    "uuid": "u",
    "generations": ["<think>3</think>3", "<think>2</think>\\boxed{2}"],
    "correctness_math_verify": [False, True],
    "is_reasoning_complete": [True, True],
}
HUMAN = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n", "entry_point": "f"}
MBPP = {"task_id": 601, "text": "Add.", "code": "def a(x):\r\n  return x", "test_list": ["assert a(1) == 1"]}
SETS: dict[str, tuple[str, str, dict[str, Any], str, str | None]] = {
    # script: (split, name of the file, record, ground truth, demonstration)
    "openr1_math": ("train", "train-00000-of-00001", R1, "2", "<think>2</think>\\boxed{2}"),
    "math500": ("test", "test", {"problem": "1+1?", "solution": "\\boxed{2}", "answer": "2"}, "2", "\\boxed{2}"),
    "aime": ("test", "train", {"ID": "1", "Problem": "?", "Solution": "So.", "Answer": 33}, "33", "So."),
    "amc": ("test", "train", {"id": 0, "problem": "?", "answer": 142.0, "url": ""}, "142", None),
    "humaneval": (
        "test",
        "HumanEval",
        {**HUMAN, "test": "def check(c):\n    assert c(1) == 1\n"},
        "def check(c):\n    assert c(1) == 1\n\ncheck(f)\n",
        "```python\ndef f(x):\n    return x\n```",
    ),
    "mbpp": ("train", "train-0", MBPP, "assert a(1) == 1\n", "```python\ndef a(x):\n  return x\n```"),
    "wizardcoder": ("train", "Evol", {"instruction": "Sort.", "output": "sorted(x)"}, "", "sorted(x)"),
    "ultrafeedback": ("train", "train_sft-0", {"prompt_id": "p", "messages": CHAT}, "", "Hello."),
    "chat": ("train", "any", {"messages": CHAT}, "", "Hello."),
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(name: str, *flags: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        runpy.run_module(f"data_prep.{name}", run_name="__main__")

    return call


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", SETS)
def test_each_script(name: str, ending: str, tmp_path: Path, script: Any) -> None:
    split, stem, record, ground_truth, demonstration = SETS[name]
    file, out = write(tmp_path / f"{stem}{ending}", [record]), tmp_path / "out" / f"{split}.parquet"
    if name == "mbpp":
        write(tmp_path / f"test-0{ending}", [{**MBPP, "task_id": 11}])
    folder = file.parent if name == "mbpp" else file
    script(name, "--local_dataset_path", folder, "--local_save_dir", out.parent)
    (row,) = pq.read_table(out).to_pylist()
    assert list(row) == ["data_source", "prompt", "demonstration", "ability", "reward_model", "extra_info"]
    assert row["reward_model"]["ground_truth"] == ground_truth
    assert row["demonstration"] == demonstration
    assert row["prompt"][-1]["role"] == "user"
    if name in ("openr1_math", "math500"):
        from verl.utils.reward_score import default_compute_score

        assert default_compute_score(row["data_source"], demonstration, ground_truth) == 1.0


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("openr1_math", {"generations": ["x"]}, "have the lengths [1, 2, 2], expected lists of one length"),
        ("math500", {"answer": None}, "'answer' is None, expected a text"),
        ("aime", {"Answer": 1000}, "expected a whole number from 0 to 999"),
        ("amc", {"answer": "two"}, "the answer is 'two', expected a number"),
        ("humaneval", {"entry_point": "g"}, "'prompt' does not define 'g', its 'entry_point'"),
        ("wizardcoder", {"output": ""}, "no text in 'output' or 'response'"),
        ("ultrafeedback", {"messages": CHAT[:1]}, "expected a list of two messages or more"),
        ("chat", {"messages": CHAT[::-1]}, "has the roles assistant, user, expected user and assistant at the end"),
    ],
)
def test_bad_records(name: str, changed: dict[str, Any], message: str, tmp_path: Path, script: Any) -> None:
    split, stem, record, *_ = SETS[name]
    file, out = write(tmp_path / f"{stem}.jsonl", [record, {**record, **changed}]), tmp_path / "out"
    with pytest.raises(SystemExit) as error:
        script(name, "--local_dataset_path", file, "--local_save_dir", out)
    assert str(error.value).startswith(f"Error: {file}, line 2: ")
    assert message in str(error.value)
    assert not out.exists()
    script(name, "--local_dataset_path", file, "--local_save_dir", out, "--skip_bad_rows")
    assert len(pq.read_table(out / f"{split}.parquet")) == 1


def test_a_draw_repeats_and_test_rows_are_no_training_rows(tmp_path: Path, script: Any) -> None:
    records = [{"instruction": f"Task {number}", "output": "x"} for number in range(600)]
    file = write(tmp_path / "a.jsonl", records)
    flags = ("--local_dataset_path", file, "--seed", 3)
    drawn = []
    for out in (tmp_path / "1", tmp_path / "2"):
        script("wizardcoder", *flags, "--local_save_dir", out, "--test_fraction", 0.2)
        drawn.append([(out / f"{split}.parquet").read_bytes() for split in ("train", "test")])
    assert drawn[0] == drawn[1]
    parts = [pq.read_table(tmp_path / "1" / f"{split}.parquet").to_pylist() for split in ("train", "test")]
    tasks = [{row["prompt"][0]["content"] for row in part} for part in parts]
    assert tasks[0].isdisjoint(tasks[1])
    assert len(tasks[0] | tasks[1]) == 600
    script("wizardcoder", *flags, "--local_save_dir", tmp_path / "3", "--max_rows", 10)
    rows = pq.read_table(tmp_path / "3" / "train.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in rows] == list(range(10))
    assert [row["prompt"][0]["content"] for row in rows] != [f"Task {number}" for number in range(10)]


def test_files_that_cannot_be_read(tmp_path: Path, script: Any) -> None:
    torn = tmp_path / "train.parquet"
    torn.write_bytes(b"PAR1 torn")
    with pytest.raises(SystemExit, match=r"train\.parquet: cannot be read as parquet"):
        script("wizardcoder", "--local_dataset_path", torn, "--local_save_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match="would replace it by its own rows"):
        script("wizardcoder", "--local_dataset_path", torn, "--local_save_dir", tmp_path)
    assert torn.read_bytes() == b"PAR1 torn"


def test_a_hub_name_offline(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=r"HF_HUB_OFFLINE; give its files by --local_dataset_path"):
        script("math500", "--local_save_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
"""
"""As the hub's page of GSM8K says which files are which configuration and split."""


def gsm8k_of_the_hub(folder: Path) -> Path:
    for name in ("main/train", "main/test", "socratic/train"):
        file = folder / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, [{"question": f"{name}, {number}?", "answer": f"So.\n#### {number}"} for number in range(3)])
    (folder / "README.md").write_text(CARD)
    return folder


def test_configurations_of_a_set_are_not_mixed(tmp_path: Path, script: Any) -> None:
    """The hub's GSM8K holds its problems twice."""
    folder = gsm8k_of_the_hub(tmp_path / "gsm8k")
    with pytest.raises(
        SystemExit, match=r"the split train are in 2 folders, .*main and .*socratic; .* give the folder"
    ):
        script("gsm8k", "--local_dataset_path", folder, "--local_save_dir", tmp_path / "out")
    script("gsm8k", "--local_dataset_path", folder / "main", "--local_save_dir", tmp_path / "out")
    questions = pq.read_table(tmp_path / "out" / "train.parquet")["extra_info"].to_pylist()
    assert [row["question"] for row in questions] == ["main/train, 0?", "main/train, 1?", "main/train, 2?"]


@pytest.mark.slow
def test_from_a_hub(tmp_path: Path) -> None:
    """By `datasets` as a stream: configuration and splits; an unknown set, and a file of other types."""
    gsm8k_of_the_hub(tmp_path / "hub" / "openai" / "gsm8k")
    strange = gsm8k_of_the_hub(tmp_path / "hub" / "some" / "strange")
    write(strange / "main/test-00000-of-00001.parquet", [{"question": "?", "answer": [1, 2]}])

    def prepare(*flags: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "data_prep.gsm8k", *flags, "--local_save_dir", str(tmp_path / "out")],
            cwd=ROOT,
            env=os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == bool(flags), done.stderr
        return done.stderr.strip()

    with running_hub(tmp_path / "hub") as address:
        assert "train: 3 rows" in prepare()
        rows = pq.read_table(tmp_path / "out" / "test.parquet")["extra_info"].to_pylist()
        assert [row["question"] for row in rows] == ["main/test, 0?", "main/test, 1?", "main/test, 2?"]
        before = (tmp_path / "out" / "train.parquet").read_bytes()
        for name, reason in {
            "no/such": "DatasetNotFoundError: ",
            "some/strange": "Couldn't cast array of type",
        }.items():
            (line,) = prepare("--dataset", name).splitlines()
            assert line.startswith(f"Error: --dataset {name}: ")
            assert reason in line
            assert line.endswith("; or give its files by --local_dataset_path")
        assert (tmp_path / "out" / "train.parquet").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_memory_stays_flat(ending: str, tmp_path: Path) -> None:
    """Largest resident memory of the command, a file of some MiB and one of ten times as many."""
    peaks = []
    for count in (5_000, 50_000):
        file, text = tmp_path / f"a{ending}", "2 and 3 make 5, as everybody knows. " * 40
        records = [{"instruction": f"{number} {text}", "output": f"{text} {number}"} for number in range(count)]
        if ending == ".json":
            file.write_text(json.dumps(records, indent=1))
        elif ending == ".jsonl":
            write(file, records)
        else:  # without compression, as texts that do not repeat are
            pq.write_table(pa.Table.from_pylist(records), file, compression="none", use_dictionary=False)
        del records
        command = [sys.executable, "-c", MEASURE, "data_prep.wizardcoder", "--local_dataset_path", str(file)]
        done = subprocess.run(
            [*command, "--local_save_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert file.stat().st_size > 100 << 20
    assert peaks[1] < peaks[0] + (40 << 10), peaks


MEASURE = """
import re, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
"""Ends with the KiB."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1} {"a": 2}]', "after item 1: not JSON: expected a comma, or one end of the list"),
        ('[{"a": 1},', "item 2: not JSON: Expecting value"),
        ('[{"a": 1}', "item 1: not JSON: the list has no end"),
        ('[{"a": 1}, {"a"', "item 2: not JSON: Expecting ':' delimiter"),
        ('[{"a": 1}]\n{"a": 2}', "after item 1: not JSON: expected a comma, or one end of the list"),
        ('[{"a": 1},]', "item 2: not JSON: Expecting value"),
    ],
)
def test_a_torn_list(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file}, {message}")):
        list(sources._read_json(file))


def test_a_list_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a piece ends, within a number too."""
    records = [{"text": 'a, ]b\\"' * number, "list": [number * 1001, [], {}]} for number in range(20)]
    file = tmp_path / "train.json"
    for content in (records, [], [12345, "x", 678]):
        for indent in (None, 2):
            file.write_text("\n " + json.dumps(content, indent=indent) + " \n\n")
            for piece in (1, 2, 7, 1 << 20):
                monkeypatch.setattr(sources, "PIECE", piece)
                assert [record for _, record in sources._read_json(file)] == content


def test_evalplus_brings_its_own_tests() -> None:
    from data_prep import mbpp

    record = {"task_id": 2, "prompt": "Add.", "code": "def a(x):\n  return x", "test_list": ["assert a(1) == 1"]}
    record |= {"test_imports": ["import math"], "test": "for x in range(9):\n    assert a(x) == x"}
    row = mbpp.convert(record, "test", 0)
    assert row is not None
    assert row["reward_model"]["ground_truth"] == "import math\nfor x in range(9):\n    assert a(x) == x\n"
    assert "assert a(1) == 1" in row["prompt"][0]["content"]
    assert mbpp.convert(record, "train", 0) is None
    assert mbpp.convert({**record, "test": " "}, "test", 0) is None  # task 2 is of neither split of MBPP itself


def test_evalplus_inputs_without_tests_are_refused() -> None:
    """Its release has the inputs that its tests add beside HumanEval's own, smaller, test."""
    from data_prep import humaneval

    record = {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": "    return x",
    }
    record |= {"test": "def check(candidate):\n    assert candidate(1) == 1"}
    assert humaneval.convert(record, "test", 0)["reward_model"]["ground_truth"].endswith("check(f)\n")
    with pytest.raises(ValueError, match="'plus_input': EvalPlus's inputs without its tests"):
        humaneval.convert({**record, "base_input": [[1]], "plus_input": [[2]], "atol": 0}, "test", 0)
