"""The pipeline in miniature, from a data set to the report, with a kill in the middle of the training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import read_steps

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "pipeline.sh"
SET = "openr1_math"
STAGES = [
    *("task", "teacher", f"prepare_{SET}", "answers", "train", "export"),
    *(f"evaluate_{SET}_teacher", f"evaluate_{SET}_after", f"divergence_{SET}_after"),
]


def end_processes(run_dir: Path) -> None:
    for process in psutil.process_iter():
        try:
            if process.environ().get("HPD_RUN_DIR") == str(run_dir):
                process.kill()
        except psutil.Error:
            continue


def start(run_dir: Path, log: Path) -> "subprocess.Popen[bytes]":
    variables = {
        "RUN_DIR": run_dir,
        "TEACHER_STEPS": 60,
        "STEPS": 40,
        "SAVE_FREQ": 10,
        "TEST_FREQ": 20,
        "TRAIN_ROWS": 512,
        "TEST_ROWS": 16,
        "EVALUATED": "teacher after",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with open(log, "w") as stream:
        return subprocess.Popen(
            ["bash", SCRIPT],
            env=os.environ | {name: str(value) for name, value in variables.items()},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def test_the_pipeline_goes_on_after_a_kill(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    try:
        killed = start(run_dir, log)
        checkpoint = run_dir / "train" / "global_step_10" / "complete"
        while not checkpoint.exists():
            assert killed.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        os.killpg(killed.pid, signal.SIGKILL)
        end_processes(run_dir)  # torchrun's are in a session of their own
        killed.wait()
        assert not (run_dir / "train.done").exists()
        again = start(run_dir, log)
        assert again.wait(600) == 0, log.read_text()[-3000:]
    finally:
        end_processes(run_dir)

    output = log.read_text()
    done = [line.split("]")[0][1:] for line in output.splitlines() if line.endswith("done before")]
    assert done == STAGES[:4]
    assert [file.stem for file in sorted(run_dir.glob("*.done"), key=lambda file: file.stat().st_mtime_ns)] == STAGES
    first, second = (read_steps(file) for file in sorted((run_dir / "train").glob("metrics_*.jsonl")))
    assert first[0]["training/global_step"] == 1
    assert second[0]["training/global_step"] > 10
    assert second[-1]["training/global_step"] == 40

    assert (run_dir / "student" / "model.safetensors").is_file()
    results = [
        json.loads((run_dir / "scores" / f"{SET}_{name}.json").read_text()) for name in ("teacher", "after", "after_kl")
    ]
    assert [len(result["items"]) for result in results[:2]] == [16, 16]
    assert results[2]["summary"]["reverse_kl"]["value"] < 0.7 * first[0]["hpd/reverse_kl_k1"]
    lines = [line.split() for line in output.splitlines()]
    table = lines[lines.index([SET]) :]
    for row in (["run", "avg@1"], ["after"], ["teacher"], ["after,", "KL"], *([stage] for stage in STAGES)):
        assert any(line[: len(row)] == row for line in table), row
    pages = {file.name for file in (run_dir / "report").iterdir()}
    assert pages >= {f"{SET}.html", f"{SET}.png", "training.png"}
