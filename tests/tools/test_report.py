"""The report: what is read of a run's log, and the picture."""

import json
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpd_verl.tools.report import COLORS, Run, draw_picture, logged, main, read_run, read_runs, smoothed


def line(step: int, **metrics: Any) -> str:
    """As verl's file logger writes it; ``hpd__loss`` stands for ``hpd/loss``."""
    data = {name.replace("__", "/"): value for name, value in metrics.items()}
    return json.dumps({"step": step, "data": data}) + "\n"


def write_run(file: Path, steps: int = 120, slope: float = 0.01) -> Path:
    with open(file, "w") as stream:
        for step in range(steps + 1):
            data: dict[str, Any] = {}
            if step % 40 == 0:
                data["val-core/addition/reward/mean@1"] = 1 - 0.7 * math.exp(-slope * step)
            if step:
                data |= {
                    "hpd/loss": math.exp(-slope * step),
                    "hpd/reverse_kl_k1": 0.5 * math.exp(-slope * step) + 0.01 * math.sin(step),
                    "actor/entropy": 0.3,
                    "actor/grad_norm": None if 50 <= step < 60 else 1.0,
                    "hpd/label_weight_mean": 1.0,
                    "timing_s/step": 0.5,
                    "perf/throughput": 12_345.6,
                }
            stream.write(line(step, **{name.replace("/", "__"): value for name, value in data.items()}))
    return file


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(line(1, hpd__loss=2.0) + line(2, hpd__loss=1.0) + '{"step": 3, "data": {"hpd/lo')
    run = read_run(file, "run")
    assert run.metrics == {"hpd/loss": {1: 2.0, 2: 1.0}}
    assert run.notes == ["1 lines could not be read, left out"]


def test_what_a_resumed_run_logs_again_counts(tmp_path: Path) -> None:
    """Steps 3 and 4 are of what was given up; a validation before the first step adds to the step gone on from."""
    file = tmp_path / "run.jsonl"
    before = [line(step, hpd__loss=10.0 + step) for step in (1, 2, 3, 4)]
    after = [line(2, val__loss=7.0), line(3, hpd__loss=0.3)]
    file.write_text("".join([*before, "{torn", "\n", line(4, hpd__loss=5.0), *after]))
    run = read_run(file, "run")
    assert run.metrics["hpd/loss"] == {1: 11.0, 2: 12.0, 3: 0.3}
    assert run.metrics["val/loss"] == {2: 7.0}
    assert run.notes == [
        "resumed 1 times; 2 steps were logged again, the last counts",
        "1 lines could not be read, left out",
    ]


@pytest.mark.parametrize("given_up", [0, 3])
@pytest.mark.parametrize("validates", [False, True])
def test_no_step_is_lost_by_a_resume(validates: bool, given_up: int, tmp_path: Path) -> None:
    """With ``val_before_train`` or without, from the last step that was logged or from one before it."""
    file = tmp_path / "run.jsonl"
    lines = [line(0, **{"val-core__a": 0.1})] if validates else []
    lines += [line(step, hpd__loss=float(step), **{"val-core__a": 0.2}) for step in range(1, 5 + given_up)]
    lines += [line(4, **{"val-core__a": 0.3})] if validates else []
    lines += [line(step, hpd__loss=step + 0.5) for step in range(5, 9)]
    file.write_text("".join(lines))
    run = read_run(file, "run")
    assert run.metrics["hpd/loss"] == {step: step + 0.5 * (step > 4) for step in range(1, 9)}
    assert run.metrics["val-core/a"][4] == (0.3 if validates else 0.2)
    said = f"resumed 1 times; {given_up} steps were logged again, the last counts"
    assert run.notes == ([said] if given_up else [])


def test_a_step_that_is_trained_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    lines = [line(1, hpd__loss=1.0), line(2, hpd__loss=2.0, actor__entropy=0.5), line(3, hpd__loss=3.0)]
    file.write_text("".join([*lines, line(2, hpd__loss=2.5)]))
    run = read_run(file, "run")
    assert run.metrics == {"hpd/loss": {1: 1.0, 2: 2.5}}
    assert run.notes == ["resumed 1 times; 2 steps were logged again, the last counts"]


def test_many_resumes_cost_no_more_than_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    lines = [json.dumps({"step": step, "data": {f"a/{name}": step for name in range(300)}}) for step in range(1, 1001)]
    lines += [line(1000 - number % 2, hpd__loss=1.0).strip() for number in range(20_000)]
    file.write_text("\n".join(lines))
    start = time.monotonic()
    run = read_run(file, "run")
    assert time.monotonic() - start < 20
    assert max(run.metrics["hpd/loss"]) == 999


def test_parts_of_one_run_are_joined_in_order(tmp_path: Path) -> None:
    """verl's logger empties its file when a run starts: a resumed run writes another."""
    (tmp_path / "metrics_20260102.jsonl").write_text(line(2, hpd__loss=0.5) + line(3, hpd__loss=0.4))
    (tmp_path / "metrics_20260101.jsonl").write_text(line(1, hpd__loss=1.0) + line(2, hpd__loss=0.9))
    assert read_run(tmp_path, "run").metrics["hpd/loss"] == {1: 1.0, 2: 0.5, 3: 0.4}


def test_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(line(1, hpd__loss=1.0) + line(2, hpd__loss=None) + '{"step": 3, "data": {"hpd/loss": NaN}}\n')
    run = read_run(file, "run")
    assert math.isnan(run.metrics["hpd/loss"][2])
    assert run.notes == ["2 values are not finite: gaps, with a mark below"]


def test_strange_lines_cost_themselves_alone(tmp_path: Path) -> None:
    good = '{"step": 1, "data": {"hpd/loss": 1, "val-core/a\u2028b": 2}}'
    huge = '{"step": 2, "data": {"hpd/loss": 1' + "0" * 400 + "}}"
    far = '{"step": 1' + "0" * 30 + ', "data": {"hpd/loss": 1}}'
    lines = ['{"step": Infinity, "data": {}}', "[" * 100_000, '{"step": -1, "data": {}}', far, good, huge]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path, "run")
    assert run.metrics["hpd/loss"][1] == 1
    assert math.isnan(run.metrics["hpd/loss"][2])
    assert run.metrics["val-core/a\u2028b"] == {1: 2}
    assert any("4 lines could not be read" in note for note in run.notes)


def test_many_values_are_smoothed_over_a_fiftieth() -> None:
    values = [float(step % 2) for step in range(300)]
    values[100] = math.nan
    smooth = smoothed(values)
    assert smooth[0] == pytest.approx(sum(values[:4]) / 4)
    assert smooth[200] == pytest.approx(sum(values[197:204]) / 7)
    assert math.isnan(smooth[100])
    assert smooth[101] == pytest.approx(sum(values[98:100] + values[101:105]) / 6)
    assert smoothed(values[:99]) is not smooth
    assert smoothed([1.0, 5.0]) == [1.0, 5.0]


def test_metrics_that_no_run_logged_are_left_out() -> None:
    run = Run("a", {"hpd/loss": {1: 1.0}, "val-core/b": {1: 0.5}, "val-core/a": {1: 0.5}})
    assert logged([run], ["actor/entropy", "val-core/.*", "hpd/loss"]) == ["val-core/a", "val-core/b", "hpd/loss"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "no line of verl's file logger"),
        ("\n\n", "no line of verl's file logger"),
        ("hello\n[1]\n", "no line of verl's file logger"),
        ('{"step": 1, "data": {"name": "text"}}\n', "no line of verl's file logger"),
        ("\x00\xff\n", "no line of verl's file logger"),
    ],
)
def test_a_file_without_metrics_is_refused(content: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"^RUN=.*run.jsonl: {found}"):
        read_run(tmp_path / "run.jsonl", "run")


def test_a_folder_must_tell_which_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_run(tmp_path / "nothing", "run")
    with pytest.raises(ValueError, match=r"no \.jsonl in it"):
        read_run(tmp_path, "run")
    write_run(tmp_path / "sft.jsonl")
    assert len(read_run(tmp_path, "run").metrics["hpd/loss"]) == 120
    write_run(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match=r"2 files there \(other.jsonl, sft.jsonl\); name the one"):
        read_run(tmp_path, "run")


def test_names_are_what_paths_differ_in(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write_run(tmp_path / name / "metrics.jsonl", steps=2))
    assert [run.name for run in read_runs(paths)] == ["a/metrics", "b/metrics"]
    assert [run.name for run in read_runs(paths, ["x", "y"])] == ["x", "y"]
    with pytest.raises(ValueError, match="--names: 1 names for 2 runs"):
        read_runs(paths, ["x"])
    with pytest.raises(ValueError, match="twice the same name"):
        read_runs(paths, ["x", "x"])


def colour(pixels: np.ndarray, number: int) -> int:
    """Pixels of the colour of a run."""
    return int((np.abs(pixels - [int(COLORS[number][each : each + 2], 16) for each in (1, 3, 5)]).sum(-1) < 30).sum())


def test_the_command_draws_runs_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / "a.jsonl")), str(write_run(tmp_path / "b.jsonl", steps=15, slope=0.1))]
    out = tmp_path / "out.v1.png"
    sizes = []
    for words in (runs, [*runs, "--names", "_$x$", "ünïcode", "--metrics", "hpd/.*"], [runs[1]]):
        main([*words, "--out", str(out)])
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out.v1.png"]
        pixels = np.asarray(Image.open(out).convert("RGB"), dtype=float)
        assert colour(pixels, 0) > 300
        assert (colour(pixels, 1) > 300) == (words != [runs[1]])
        sizes.append(pixels.shape[:2])
    assert len(set(sizes)) == 3
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["a: 10 values are not finite: gaps, with a mark below", str(out)]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["nothing"], "RUN=nothing: no such file"),
        (["run.jsonl", "--out", "no/such/out.png"], "cannot write no/such/out.png (No such file or directory)"),
        (["run.jsonl", "--out", "out"], "--out=out: expected a file that ends with .png"),
        (["run.jsonl", "--metrics", "hpd/los"], "--metrics=hpd/los: no run logged it"),
        (["run.jsonl", "--metrics", "["], "--metrics=[: no pattern"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_line(
    flags: list[str], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run.jsonl", steps=3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert str(ended.value.code).startswith("Error: ")
    assert found in str(ended.value.code)
    assert len(str(ended.value.code).splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl", steps=3)
    before = tmp_path / "report.png"
    before.write_text("before")
    words = [sys.executable, "-m", "hpd_verl.tools.report", str(tmp_path), "--out", str(before)]
    limited = f"ulimit -f 1; exec {shlex.join(words)}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"Error: .*cannot write .*report\.png \(File too large\); make room, or give another --out", last
    )
    assert before.read_text() == "before"
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "report.png"}


def test_a_run_of_one_step_and_one_unknown_metric_is_drawn(tmp_path: Path) -> None:
    draw_picture([Run("a", {"mine/score": {5: 1.0}})], tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.slow
def test_without_matplotlib_one_line_says_so(tmp_path: Path) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; import hpd_verl.tools.report"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    assert run.stderr.strip() == (
        "Error: matplotlib is not installed; pip install 'hpd-verl[report]', or matplotlib itself"
    )
