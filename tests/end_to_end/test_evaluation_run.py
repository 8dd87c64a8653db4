"""Evaluation of a model run by vLLM, as a user gives the commands."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import Tiny

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *flags: str) -> str:
    command = [sys.executable, "-m", f"examples.evaluation.{name}", *flags]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_maths_and_divergence_of_a_models_answers(tiny: Tiny, tmp_path: Path) -> None:
    out, kl = tmp_path / "sampled.json", tmp_path / "kl.json"
    shared = ["--data", str(tiny.validation), "--out"]
    printed = run(
        "maths",
        *(*shared, str(out), "--model", str(tiny.student), "--n", "3", "--temperature", "1", "--max_tokens", "8"),
        *("--engine_kwargs", json.dumps({"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True})),
    )
    result: dict[str, Any] = json.loads(out.read_text())
    assert "avg@3" in printed
    assert [len(item["answers"]) for item in result["items"]] == [3] * 8
    assert len({answer for item in result["items"] for answer in item["answers"]}) > 3
    assert {reason for item in result["items"] for reason in item["finish_reasons"]} <= {"stop", "length"}
    assert result["summary"]["avg@3"]["problems"] == 8
    models = ["--student", str(tiny.student), "--teacher", str(tiny.teacher), "--answers", str(out)]
    run("divergence", *shared, str(kl), *models, "--device", "cpu")
    found = json.loads(kl.read_text())["summary"]
    assert found["reverse_kl"]["value"] > 0
    # What the student draws, it finds likelier than the teacher does.
    assert found["student_nll"]["value"] < found["teacher_nll"]["value"]
