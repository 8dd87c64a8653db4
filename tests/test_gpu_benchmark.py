"""The stages of benchmarks/gpu.sh: what becomes of one does not touch the others."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_stages_are_independent(gpu: Any, tmp_path: Path) -> None:
    """Each is written down with its result, or with what stopped it."""
    options = argparse.Namespace(device="cpu", small=True, json=tmp_path / "results" / "gpu.json")
    stages = gpu.Stages(options, tmp_path)

    def python(code: str, seconds: float = 60) -> str:
        return stages.command(sys.executable, "-c", code, seconds=seconds)

    def skipped() -> None:
        raise gpu.Skipped("not installed: something")

    stages.run("fails", lambda: python("print('the reason'); raise SystemExit(3)"))
    stages.run("hangs", lambda: python("print('so far', flush=True); import time; time.sleep(60)", seconds=1))
    stages.run("breaks", lambda: 1 / 0)
    stages.run("skipped", skipped)
    stages.run("works", lambda: python("print('done')"))
    stages.deadline = 0.0
    stages.run("too late", lambda: python("print('done')"))
    report = json.loads(options.json.read_text())
    assert report["machine"]["torch"] == report["versions"]["torch"]
    found = {name: (entry["status"], str(entry)) for name, entry in report["stages"].items()}
    expected = {
        "fails": ("failed", "ended with 3\\nthe reason"),
        "hangs": ("failed", "was stopped after 1 s\\nso far"),
        "breaks": ("failed", "division by zero"),
        "skipped": ("skipped", "not installed: something"),
        "works": ("passed", "done"),
        "too late": ("skipped", "590 s are over"),
    }
    assert list(found) == list(expected)
    for name, (status, text) in expected.items():
        assert found[name][0] == status, name
        assert text in found[name][1], name
