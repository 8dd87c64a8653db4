"""What a fresh machine installs: what the code imports, and versions that a package index has."""

import ast
import functools
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NO_WHEEL = "antlr4-python3-runtime"  # Hydra's, plain Python: builds anywhere
UNREACHABLE = ("Failed to fetch", "Request failed", "error sending request", "Connection refused", "timed out")


def pip_settings() -> dict[str, str]:
    """The index that pip is told to use, in uv's words: uv does not read pip's configuration."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    named = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "cert": "SSL_CERT_FILE"}
    return {uv: settings[pip] for pip, uv in named.items() if settings.get(pip)}


def resolve(extra: str, python: str) -> subprocess.CompletedProcess[str]:
    """What pip would install for an extra on x86-64 Linux, from wheels alone."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", extra),
            *("--python-version", python, "--python-platform", "x86_64-manylinux_2_35", "--no-python-downloads"),
            *("--only-binary", ":all:", "--no-binary", NO_WHEEL, "--no-header", "--no-annotate", "--quiet"),
            *("--index-strategy", "unsafe-best-match"),  # pip's: the best version of all indices
        ],
        cwd=ROOT,
        env={**os.environ, "UV_HTTP_TIMEOUT": "15", **pip_settings()},
        capture_output=True,
        text=True,
        timeout=120,
    )


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    "tools/rewards": "evaluation",
    "tools/report": "report",
    "tools/generation/vllm_engines.py": "gpu",
    "cpu/vllm.py": "gpu",
}
"""What of the package needs an extra, by the beginning of its path."""


def names_of(requirements: Iterable[str]) -> set[str]:
    """Of the distributions that are required, those of their extras included."""
    parsed = [Requirement(each) for each in requirements]
    return {canonicalize_name(name) for each in parsed for name in (each.name, *each.extras)}


def imported(*folders: str) -> dict[str, set[str]]:
    """Top-level modules that files import from others, each with the files, from the folders on."""
    found: dict[str, set[str]] = {}
    for folder, file in ((each, file) for each in folders for file in (ROOT / each).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for module in {each.split(".")[0] for each in modules} - sys.stdlib_module_names - {"hpd_verl"}:
                found.setdefault(module, set()).add(str(file.relative_to(ROOT / folder)))
    return found


OF_MODULES = functools.cache(importlib.metadata.packages_distributions)


def distributions(module: str) -> set[str]:
    """Distributions that a module may come from."""
    return {canonicalize_name(name) for name in (module, *OF_MODULES().get(module, []))}


def test_what_is_imported_is_declared() -> None:
    undeclared = []
    for module, file in ((module, file) for module, files in imported("hpd_verl").items() for file in sorted(files)):
        extra = next((extra for start, extra in EXTRAS.items() if file.startswith(start)), None)
        declared = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else [])]
        if not distributions(module) & names_of(declared):
            undeclared.append(f"{module} of hpd_verl/{file}")
    assert not undeclared, f"declare in pyproject.toml: {', '.join(undeclared)}"


def test_what_is_declared_is_imported() -> None:
    """By this package; or by verl or TransferQueue, and verl does not declare it."""
    ours = {name for module in imported("hpd_verl") for name in distributions(module)}
    theirs = names_of(PROJECT["dependencies"]) - ours
    sources = [path for module in ("verl", "transfer_queue") for path in installed(module).rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r"^[ \t]*(?:import|from) (\w+)", text, re.MULTILINE))
    by_verl = names_of(each for each in importlib.metadata.requires("verl") or [] if "extra ==" not in each)
    assert theirs <= {name for module in used for name in distributions(module)} - by_verl
    for extra in ("report", "evaluation"):
        beside = {name for module in imported("hpd_verl", "examples", "data_prep") for name in distributions(module)}
        assert names_of(PROJECT["optional-dependencies"][extra]) <= beside, extra


def installed(module: str) -> Path:
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_gpu_extra_resolves(python: str) -> None:
    """To the versions that docs/install.md names, and without a package that has to be built."""
    try:
        run = resolve("gpu", python)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index did not answer in time")
    if run.returncode != 0 and any(each in run.stderr for each in UNREACHABLE):
        pytest.skip(f"the package index cannot be reached: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    found = dict(line.split(" ")[0].split("==") for line in run.stdout.splitlines() if "==" in line)
    versions = {name: found.get(name) for name in ("verl", "torch", "vllm", "transformers")}
    assert versions == {"verl": "0.9.1", "torch": "2.11.0", "vllm": "0.24.0", "transformers": "5.9.0"}
    assert "flash-attn" not in found
