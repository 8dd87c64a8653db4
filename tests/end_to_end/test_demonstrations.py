"""A teacher's demonstrations by vLLM: by two engines, killed in the middle, resumed, taken by the trainer's checks."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import Tiny, start_module
from transformers import AutoTokenizer

from hpd_verl.data.demonstration import DemonstrationTokenizer
from hpd_verl.data.files import RowRules, check_files

pytestmark = pytest.mark.xdist_group("demonstrations")  # the undisturbed run is made once

ROOT = Path(__file__).resolve().parents[2]
METADATA = b"hpd_verl.demonstrations"


FEW_AT_A_TIME = {"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 2}
ALL_AT_ONCE = {"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 64, "max_num_batched_tokens": 128}
"""Prompts of 9 tokens: not all of them fit the first step."""


def command(tiny: Tiny, out: Path, *flags: str, engine: dict[str, int] | None = None) -> list[str]:
    return [
        *("--prompts", str(tiny.train), "--local_save_dir", str(out), "--model", str(tiny.teacher)),
        *("--n", "2", "--max_tokens", "16", "--dtype", "float32", "--processes", "1"),
        *("--engine_kwargs", json.dumps(engine or FEW_AT_A_TIME)),
        *flags,
    ]


Start = Callable[[list[str], Path], ForkServerProcess]


@pytest.fixture(scope="module")
def start(processes: ForkServerContext) -> Start:
    """Start the command with these words and a file for its output."""
    return lambda words, output: start_module(processes, "hpd_verl.tools.demonstrations", words, ROOT, output)


def run(start: Start, words: list[str], output: Path) -> str:
    process = start(words, output)
    process.join(400)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def lines_of(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()[1:]]


def kill_in_the_middle(process: ForkServerProcess, journal: Path, output: Path) -> int:
    """SIGKILL to the process that writes, once some prompts are finished; returns their number."""
    assert process.pid is not None
    try:
        deadline = time.monotonic() + 300
        while not journal.exists() or journal.read_bytes().count(b"\n") < 1 + 5:
            assert process.exitcode is None, output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
        while _runs(process.pid):  # the engines end with it
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        if _runs(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    return journal.read_bytes().count(b"\n") - 1


def _runs(group: int) -> bool:
    """Whether any process of this group runs."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, start: Start) -> tuple[Path, str]:
    """The folder of a run with two engines, and what it said."""
    out = tmp_path_factory.mktemp("undisturbed")
    words = command(tiny, out, "--data_parallel_size", "2", "--keep", "all", engine=ALL_AT_ONCE)
    return out, run(start, words, out.with_suffix(".txt"))


def test_killed_and_resumed(tiny: Tiny, tmp_path: Path, undisturbed: tuple[Path, str], start: Start) -> None:
    journal, words = tmp_path / "train.answers.jsonl", command(tiny, tmp_path, "--keep", "all")
    output = tmp_path / "output.txt"
    finished = kill_in_the_middle(start(words, output), journal, output)
    assert 5 <= finished < 64
    assert not (tmp_path / "train.parquet").exists()
    before = journal.read_bytes()[: journal.read_bytes().rindex(b"\n") + 1]
    said = run(start, words, output)
    assert f"{finished} of 64 prompts have their answers in {journal}" in said
    assert journal.read_bytes().startswith(before)
    positions = [line["position"] for line in lines_of(journal)]
    assert sorted(positions) == list(range(64)), "none lost, none doubled"
    # One engine or two, in one run or two: the same rows.
    whole, resumed = (pq.read_table(out / "train.parquet") for out in (undisturbed[0], tmp_path))
    assert resumed.equals(whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "output.txt",
        "train.answers.jsonl",
        "train.parquet",
        "train.without_rows.jsonl",
    ]


def test_rows_are_what_the_teacher_generated(tiny: Tiny, undisturbed: tuple[Path, str]) -> None:
    out, said = undisturbed
    table = pq.read_table(out / "train.parquet")
    source = pq.read_table(tiny.train).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    demonstrations = DemonstrationTokenizer(tokenizer, {}, max_length=64)
    expected, fates, differing = [], Counter[str](), 0
    answers = {line["position"]: line["answers"] for line in lines_of(out / "train.answers.jsonl")}
    without = []
    for position, row in enumerate(source):
        kept = 0
        for answer in answers[position]:
            ended = answer["finish_reason"] == "stop"
            assert (answer["tokens"][-1] == tokenizer.eos_token_id) == ended
            assert len(answer["tokens"]) == 16 or ended
            if not ended or not answer["text"].strip():
                fates["cut" if not ended else "empty"] += 1
                continue
            try:
                tokens = demonstrations.encode(row["prompt"], answer["text"]).ids
            except ValueError:
                fates["refused"] += 1
                continue
            assert answer["text"] == tokenizer.decode(answer["tokens"][:-1])
            differing += tokens != answer["tokens"]
            expected.append({**row, "demonstration": answer["text"]})
            kept += 1
        if not kept:
            without.append(position)
    assert table.to_pylist() == expected
    assert table.column_names == list(source[0])
    assert f"64 prompts, 128 answers: {len(expected)} rows -> {out / 'train.parquet'}" in said
    assert f"answers cut by the length: {fates['cut']}" in said
    assert f"prompts without a row: {len(without)} -> {out / 'train.without_rows.jsonl'}" in said
    listed = [json.loads(line) for line in (out / "train.without_rows.jsonl").read_text().splitlines()]
    assert [line["row"] for line in listed] == without
    assert 0 < len(without) < 64
    assert ("tokens are not those generated" in said) == (differing > 0)
    made = json.loads(pq.read_schema(out / "train.parquet").metadata[METADATA])
    assert made["model"] == str(tiny.teacher)
    assert made["sampling"] == {
        "n": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 16,
        "seed": 0,
    }
    assert made["source"] == str(tiny.train)
    assert made["counts"]["rows"] == len(expected)
    assert sum(made["counts"]["answers"].values()) == 128
    rules = RowRules("prompt", ("images", "videos", "audios"), reads_demonstrations=True, needs_demonstrations=True)
    (file,) = check_files("data.train_files", str(out / "train.parquet"), rules)
    assert file.rows == len(expected)


def test_another_choice_generates_nothing(
    tiny: Tiny, tmp_path: Path, undisturbed: tuple[Path, str], start: Start
) -> None:
    """By a reward function, from the same journal; no engine starts."""
    out, _ = undisturbed
    journal = (out / "train.answers.jsonl").read_bytes()
    words = command(tiny, out, "--reward", str(tiny.reward), "--keep", "best")
    said = run(start, words, tmp_path / "output.txt")
    assert "64 of 64 prompts have their answers" in said
    assert "rejected by the reward function" in said
    assert (out / "train.answers.jsonl").read_bytes() == journal
    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert rows
    for row in rows:
        assert row["reward_model"]["ground_truth"] in row["demonstration"].split()
    indices = [row["extra_info"]["index"] for row in rows]
    assert indices == sorted(set(indices))
