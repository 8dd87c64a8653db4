"""The extras that a fresh machine installs, resolved without installing anything: needs a package index."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

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
