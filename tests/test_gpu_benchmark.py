"""The stages of benchmarks/gpu.sh: what becomes of one does not touch the others."""

import argparse
import json
import os
import subprocess
import sys
import zipfile
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
    options = argparse.Namespace(device="cpu", small=True, out=tmp_path / "results")
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
    report = json.loads((options.out / "gpu.json").read_text())
    assert (options.out / "hangs.log").read_text() == "so far\n"
    assert report["machine"]["torch"] == report["versions"]["torch"]
    found = {name: (entry["status"], str(entry)) for name, entry in report["stages"].items()}
    expected = {
        "fails": ("failed", "ended with 3\\nthe reason"),
        "hangs": ("failed", "was stopped after 1 s\\nso far"),
        "breaks": ("failed", "division by zero"),
        "skipped": ("skipped", "not installed: something"),
        "works": ("passed", "done"),
        "too late": ("skipped", "470 s are over"),
    }
    assert list(found) == list(expected)
    for name, (status, text) in expected.items():
        assert found[name][0] == status, name
        assert text in found[name][1], name


def make_wheel(folder: Path, name: str, version: str) -> None:
    """A package of nothing but its name."""
    record = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{record}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{record}/RECORD", "")


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    """In its small form, with packages of a folder: wheels, or as they are installed; results are beside the output."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    make_wheel(wheels, "liger_kernel", "98.7")
    with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
        wheel.extractall(site)
    for folder, stage in ((wheels, "^output layer$"), (site, "^no stage$")):
        out = tmp_path / "out" / folder.name
        command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--small", "--only", stage]
        command += ["--out", str(out), "--packages", str(folder)]
        environment = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
        report = json.loads((out / "gpu.json").read_text())
        assert report["versions"]["liger-kernel"] == "98.7"
        if stage == "^output layer$":
            rows = {row["implementation"]: float(row["ratio"]) for row in report["stages"]["output layer"]["result"]}
            assert rows.keys() == {"gemms", "gemms_and_teacher", "head", "fkl_and_teacher"}
            assert min(rows.values()) > 0
            assert "fkl_and_teacher" in (out / "output-layer.log").read_text()
