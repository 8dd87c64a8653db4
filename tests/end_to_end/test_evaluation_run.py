"""Evaluation of a model run by vLLM, as a user gives the commands."""

import json
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from conftest import Tiny, start_module

ROOT = Path(__file__).resolve().parents[2]


def test_maths_and_divergence_of_a_models_answers(tiny: Tiny, tmp_path: Path, processes: ForkServerContext) -> None:
    def run(name: str, *flags: str) -> str:
        output = tmp_path / f"{name}.txt"
        process = start_module(processes, f"examples.evaluation.{name}", list(flags), ROOT, output)
        process.join(400)
        assert process.exitcode == 0, output.read_text()
        return output.read_text()

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
