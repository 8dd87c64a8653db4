"""How examples/slurm/sweep.sbatch reads its file; test_slurm.py runs it on a real Slurm."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "slurm"


def sweep(folder: Path, file: str, content: bytes, line: int = 1) -> "subprocess.CompletedProcess[str]":
    """The script of a sweep with a line of a file; in place of the trainer's script one that lists its words."""
    programs = folder / "bin"
    programs.mkdir()
    shutil.copy(SCRIPTS / "sweep.sbatch", folder)
    (folder / "sft.sbatch").write_text("printf '<%s>' \"$@\"\n")
    (programs / "scontrol").write_text(f"#!/bin/bash\necho '   Command={folder}/sweep.sbatch x'\n")
    (programs / "scontrol").chmod(0o755)
    (folder / "other=1").touch()  # what a * would match
    (folder / file).write_bytes(content)
    return subprocess.run(
        ["bash", folder / "sweep.sbatch", file, "model.path=a b"],
        cwd=folder,
        env=os.environ
        | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(line), "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("s.txt", b"a=1 b=2\n", ["a=1", "b=2"]),
        ("s.txt", b"a=1\r\nb=2\r\n", ["a=1"]),
        ("s.txt", b"a=1", ["a=1"]),
        ("s.txt", b"  a=1   b=2  \n", ["a=1", "b=2"]),
        ("s.txt", b"o*=1 *=2 data.train_files=/d/*.parquet\n", ["o*=1", "*=2", "data.train_files=/d/*.parquet"]),
        ("s.txt", b"'a={x: 1, y: [2, *]}' \"b=c d\" c=d\\ e\n", ["a={x: 1, y: [2, *]}", "b=c d", "c=d e"]),
        ("s.txt", b"a=$(touch /tmp/no) b=`x` c=$HOME d=${oc.env:HOME}\n".replace(b" /tmp/no", b""), None),
        ("my sweep.txt", b"a=1\n", ["a=1"]),
        ("2024_1.txt", b"a=1\n", ["a=1"]),
        ("o*.txt", b"a=1\n", ["a=1"]),
        ("s.txt", b"~a +b=1 ++c=2\n", ["~a", "+b=1", "++c=2"]),
    ],
)
def test_lines_of_a_sweep_are_words_and_nothing_else(
    file: str, content: bytes, words: list[str] | None, tmp_path: Path
) -> None:
    result = sweep(tmp_path, file, content)
    assert result.returncode == 0, result.stderr
    found = re.findall("<([^>]*)>", result.stdout.splitlines()[-1])
    name = f"trainer.experiment_name='{file.removesuffix('.txt')}_1'"
    words = words or ["a=$(touch)", "b=`x`", "c=$HOME", "d=${oc.env:HOME}"]
    assert found == ["model.path=a b", name, *words]
    parsed = OverridesParser.create().parse_override(name)
    assert parsed.value() == name.split("'")[1]


@pytest.mark.parametrize(
    ("file", "content", "line", "found"),
    [
        ("s.txt", b"a=1\n\n", 2, "--array: line 2 of s.txt is empty or not there; it has 1 runs"),
        ("s.txt", b"a=1\r\n\r\n", 2, "--array: line 2 of s.txt is empty or not there; it has 1 runs"),
        ("s.txt", b"a=1\n", 7, "--array: line 7 of s.txt is empty or not there; it has 1 runs"),
        ("s.txt", b"a=1\n", 0, "--array: task 0; lines count from 1, as in --array=1-4"),
        ("s.txt", b"a={x: 1}\n", 1, "s.txt, line 1: 1} is no key=value; put quotes around an override with spaces"),
        ("s.txt", b"# a=1\n", 1, "s.txt, line 1: # is no key=value; put quotes around an override with spaces"),
        ("s.txt", b"a='1\n", 1, "s.txt, line 1: a quote has no end: a='1"),
        ("it's.txt", b"a=1\n", 1, "FILE=it's.txt: its name becomes the runs' folder; name it by letters, digits, "),
        ("a=b.txt", b"a=1\n", 1, "FILE=a=b.txt: its name becomes the runs' folder; name it by letters, digits, "),
    ],
)
def test_a_sweep_that_cannot_be_run_says_so_in_a_line(
    file: str, content: bytes, line: int, found: str, tmp_path: Path
) -> None:
    result = sweep(tmp_path, file, content, line)
    assert result.returncode == 2
    assert result.stderr.startswith(f"Error: {found}")
    assert result.stderr.count("\n") == 1
    assert "<" not in result.stdout
