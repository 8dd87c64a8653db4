"""data_prep: from JSON lines to verl's columns, and errors that name file and line."""

import io
import json
import logging
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from hpd_verl.data.dataset import HPDDataset
from hpd_verl.data.row import tools_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # data_prep is no part of the installed package

from data_prep import chat, gsm8k, rows, sources  # noqa: E402

ANSWER = "She has 2*600 = <<2*600=1200>>1200 beads.\nShe sells 1200/2 = $<<1200/2=600>>600.\n#### 1,200"


def write_gsm8k(folder: Path, **changed: str) -> Path:
    """A folder of one good record a split; ``changed`` replaces a split's text."""
    folder.mkdir(exist_ok=True)
    good = json.dumps({"question": " How many? ", "answer": ANSWER}) + "\n"
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(changed.get(split, good), encoding="utf-8")
    return folder


def prepare(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "data_prep.gsm8k"),
        *("--local_dataset_path", str(folder)),
        *("--local_save_dir", str(out)),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def converted(file: Path, tally: rows.Tally | None = None, skip_bad_rows: bool = False) -> list[dict[str, Any]]:
    records = sources.read("train", gsm8k.SOURCE, {"train": [file]}, "")
    return list(rows.convert_records(records, "train", gsm8k.convert, tally or rows.Tally(), skip_bad_rows))


def test_gsm8k_columns_and_contents(tmp_path: Path) -> None:
    record = json.dumps({"question": "How much?", "answer": "It is -0.5.\n#### -0.5"})
    folder = write_gsm8k(tmp_path / "gsm8k", train=f"{record}\n\n{record}\n")
    result = prepare(folder, tmp_path / "new" / "out")
    assert result.returncode == 0, result.stderr
    assert "train: 2 rows" in result.stderr
    assert "test: 1 rows" in result.stderr

    train = pq.read_table(tmp_path / "new" / "out" / "train.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in train] == [0, 1]
    assert train[0]["reward_model"] == {"style": "rule", "ground_truth": "-0.5"}
    (row,) = pq.read_table(tmp_path / "new" / "out" / "test.parquet").to_pylist()
    assert row == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"How many? {gsm8k.INSTRUCTION}"}],
        "demonstration": "She has 2*600 = 1200 beads.\nShe sells 1200/2 = $600.\n#### 1,200",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1200"},
        "extra_info": {"split": "test", "index": 0, "question": "How many?", "answer": ANSWER},
    }
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        "test.parquet",
        "train.parquet",
    ]


@pytest.mark.parametrize("answer", [ANSWER, "#### 7", "It is minus three.\n#### -3", "Half of it: 0.5\n#### 0.5"])
def test_verl_rewards_the_demonstration(answer: str) -> None:
    from verl.utils.reward_score import default_compute_score

    row = gsm8k.convert({"question": "How many?", "answer": answer}, "train", 0)
    ground_truth = row["reward_model"]["ground_truth"]
    assert default_compute_score(row["data_source"], row["demonstration"], ground_truth) == 1.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list, expected an object"),
        ('{"question": "How many?"}', "no key 'answer', there are question"),
        ('{"question": null, "answer": "#### 1"}', "'question' is None, expected a text"),
        ('{"question": " ", "answer": "#### 1"}', "'question' is ' ', expected a text"),
        ('{"question": "How many?", "answer": "Ten."}', "no final answer: the last line is 'Ten.'"),
        ('{"question": "How many?", "answer": "#### 1\\nor so"}', "no final answer"),
        ('{"question": "How many?", "answer": "#### ten"}', "no final answer"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"question": "How many?", "answer": ANSWER})
    file = write_gsm8k(tmp_path, train=f"{good}\n\n{line}\n") / "train.jsonl"
    with pytest.raises(ValueError, match=r"train\.jsonl, line 3: ") as error:
        converted(file)
    assert message in str(error.value)
    tally = rows.Tally()
    assert len(converted(file, tally, skip_bad_rows=True)) == 1
    assert tally.bad == 1
    assert message in tally.first_bad


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_no_rows(tmp_path: Path, text: str) -> None:
    result = prepare(write_gsm8k(tmp_path / "gsm8k", train=text), tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr == "Error: train: no rows, 0 left out\n"
    assert not (tmp_path / "out").exists()


def test_bad_data_ends_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    folder = write_gsm8k(tmp_path / "gsm8k", test='{"question": "How many?", "answer": "Ten."}\n')
    result = prepare(folder, tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: {folder / 'test.jsonl'}, line 1: no final answer")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    folder, out = write_gsm8k(tmp_path / "gsm8k"), tmp_path / "out"
    words = [sys.executable, "-m", "data_prep.gsm8k", "--local_dataset_path", folder, "--local_save_dir", out]
    limited = f"ulimit -f 0; exec {shlex.join(map(str, words))}"
    result = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: {out / 'train.parquet'}: cannot be written: ")
    assert "File too large; make room and give the same command again" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_missing_file(tmp_path: Path) -> None:
    result = prepare(tmp_path / "nowhere", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr == f"Error: {tmp_path / 'nowhere'}: no such file or folder\n"


def test_build_row_carries_extra_info() -> None:
    row: dict[str, Any] = rows.build_row(
        data_source="source",
        prompt=[{"role": "user", "content": "?"}],
        demonstration="!",
        ability="dialogue",
        ground_truth="",
        split="train",
        index=3,
        origin="here",
    )
    assert row["extra_info"] == {"split": "train", "index": 3, "origin": "here"}


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """The file of an earlier run stays whole, and the next run writes it anew."""
    source, out = tmp_path / "chats.jsonl", tmp_path / "out"
    command = [
        *(sys.executable, "-m", "data_prep.chat", "--local_dataset_path", str(source)),
        *("--local_save_dir", str(out), "--data_source", "new"),
    ]
    chat = [{"role": "user", "content": "question " * 300}, {"role": "assistant", "content": "answer " * 300}]
    source.write_text((json.dumps({"messages": chat}) + "\n") * 6000)
    out.mkdir()
    pq.write_table(pa.table({"earlier": [1]}), out / "train.parquet")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (out / "train.unfinished").exists() or not (out / "train.unfinished").stat().st_size:
            assert process.poll() is None
            assert time.monotonic() < deadline
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert pq.read_table(out / "train.parquet").to_pylist() == [{"earlier": 1}]
    with pytest.raises(pa.ArrowException):
        pq.read_table(out / "train.unfinished")  # it was in the middle
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=100)
    assert pq.ParquetFile(out / "train.parquet").metadata.num_rows == 6000
    assert [file.name for file in out.iterdir()] == ["train.parquet"]


def chat_rows(folder: Path, records: list[dict[str, Any]], *flags: str) -> tuple[list[dict[str, Any]], str]:
    """The rows that data_prep.chat makes of these records, and what it says."""
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = ["chat", "--local_dataset_path", str(folder / "chats.jsonl"), "--local_save_dir", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [*arguments, *flags])
        warnings.simplefilter("ignore")
        said = io.StringIO()
        handler = logging.StreamHandler(said)
        logging.getLogger("data_prep").addHandler(handler)
        try:
            rows.run("", sources.Source("", {"train": "train"}), None, chat.add_arguments, chat.configure)
        finally:
            logging.getLogger("data_prep").removeHandler(handler)
    return pq.read_table(folder / "out" / "train.parquet").to_pylist(), said.getvalue()


def test_chat_keeps_reasoning_calls_and_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose fields no row before had come behind a group that is written; text alone is written as text."""
    monkeypatch.setattr(rows, "ROWS_PER_GROUP", 2)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    user = {"role": "user", "content": "q"}
    text = {"messages": [user, {"role": "assistant", "content": "a", "weight": 1}]}
    thought = {"messages": [user, {"role": "assistant", "content": "a", "thinking": "t"}]}
    calls: dict[str, Any] = {
        "messages": [
            user,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "r", "name": "f"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    found, said = chat_rows(tmp_path, [text, text, text])
    assert [row["demonstration"] for row in found] == ["a", "a", "a"]
    assert "messages hold 'weight', which is dropped" in said
    assert "tools" not in found[0]
    found, said = chat_rows(tmp_path, [text, text, thought, text, calls], "--reasoning_key", "reasoning_content")
    read = HPDDataset(str(tmp_path / "out" / "train.parquet"), None, _data(tmp_path / "out" / "train.parquet"))
    assert [read.row(index)["demonstration"][0] for index in range(4)] == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "a", "reasoning_content": "t"},
        {"role": "assistant", "content": "a"},
    ]
    last = read.row(4)
    assert last["prompt"] == [user, {"role": "assistant", "content": "", "tool_calls": [call]}, calls["messages"][2]]
    assert last["demonstration"] == [calls["messages"][3]]
    assert tools_of(last["tools"]) == calls["tools"]
    assert [row["extra_info"]["index"] for row in found] == [0, 1, 2, 3, 4]


def _data(file: Path) -> Any:
    hpd = {"on_policy_fraction": 0.0, "missing_demonstration": "error", "overlong_demonstration": "truncate"}
    return OmegaConf.create({"train_files": str(file), "filter_overlong_prompts": False, "hpd": hpd})
