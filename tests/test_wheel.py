"""The wheel holds every module, every configuration and py.typed, and its modules import without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
IMPORT_ALL = """
import pathlib, pkgutil, sys
import hpd_verl
from hpd_verl.hydra_config import config_dir
here = pathlib.Path(sys.argv[1])
assert pathlib.Path(hpd_verl.__file__).is_relative_to(here), hpd_verl.__file__
assert config_dir() == here / "hpd_verl" / "configs", config_dir()
for module in pkgutil.walk_packages(hpd_verl.__path__, "hpd_verl."):
    __import__(module.name)
    print(module.name)
"""


def files(folder: str, suffix: str) -> set[str]:
    return {str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob(f"*{suffix}")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, built without a network from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("hpd_verl", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*pip, "-w", folder, source], cwd=folder, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def test_nothing_is_missing(installed: Path) -> None:
    expected = files("hpd_verl", ".py") | {f"hpd_verl/{name}" for name in files("configs", ".yaml")}
    expected.add("hpd_verl/py.typed")
    package = (installed / "hpd_verl").rglob("*")
    assert {str(file.relative_to(installed)) for file in package if file.is_file()} == expected
    assert [file.name for file in installed.iterdir() if file.suffix != ".dist-info"] == ["hpd_verl"]


def test_modules_import(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, installed],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    imported = {name.replace(".", "/") for name in run.stdout.splitlines()}
    modules = {name.removesuffix(".py").removesuffix("/__init__") for name in files("hpd_verl", ".py")} - {"hpd_verl"}
    assert modules <= imported
