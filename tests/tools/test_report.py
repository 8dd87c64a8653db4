"""The report: what is read of a run's log, the picture, and the page in a real browser."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpd_verl.tools.report import Run, draw_picture, logged, main, page, read_run, read_runs, smoothed, summarize

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


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
    assert run.notes == ["run.jsonl: the last line is torn, left out"]


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


def test_many_metrics_and_many_resumes_take_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 metrics a page draws some and says so; going back and forth costs no more than the lines."""
    file = tmp_path / "run.jsonl"
    lines = [json.dumps({"step": step, "data": {f"a/{name}": step for name in range(300)}}) for step in range(1, 1001)]
    lines += [line(1000 - number % 2, hpd__loss=1.0).strip() for number in range(20_000)]
    file.write_text("\n".join(lines))
    start = time.monotonic()
    run = read_run(file, "run")
    assert time.monotonic() - start < 20
    many = Run("many", {f"val-core/{name}": {1: 1.0, 2: 0.5} for name in range(300)})
    monkeypatch.setattr("hpd_verl.tools.report._FIGURES", 4)
    text = page([many])
    assert text.count("<figure>") == 4
    assert "Figures of 4 of 300 metrics; the others are under All numbers." in text
    assert "<td>val-core/299</td>" in text
    assert run.steps == 999


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
    summary = summarize(run.metrics["hpd/loss"], "hpd/loss")
    assert summary is not None
    assert (summary.first, summary.last, summary.best) == (1.0, 1.0, None)


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


def test_best_is_the_most_or_the_least() -> None:
    values = {1: 0.5, 2: 0.9, 3: 0.7}
    for metric, best in (
        ("val-core/a/reward/mean@1", (0.9, 2)),
        ("hpd/reverse_kl_k1", (0.5, 1)),
        ("actor/lr", (None, None)),
    ):
        summary = summarize(values, metric)
        assert summary is not None
        assert (summary.best, summary.best_step) == best
    assert summarize({1: math.nan}, "actor/lr") is None


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
    assert read_run(tmp_path, "run").steps == 120
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


class Resources(HTMLParser):
    """What a page would fetch, and its figures' text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.labels: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")
            if name == "aria-label":
                self.labels.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        assert tag not in ("script", "link", "iframe"), tag


def test_the_page_fetches_nothing_and_says_its_figures_in_words(tmp_path: Path) -> None:
    runs = read_runs(
        [write_run(tmp_path / "a.jsonl"), write_run(tmp_path / "b.jsonl", slope=0.02)], ["ünïcode", "<b>$x$"]
    )
    text = page(runs)
    found = Resources()
    found.feed(text)
    assert found.fetched == []
    assert len(found.ids) == len(set(found.ids)), "figures share the names of their parts"
    assert any(
        label.startswith("hpd/loss by training step. ünïcode: from 0.99 to 0.3012; <b>$x$: ") for label in found.labels
    )
    assert "<b>$x$" not in text, "a name is not escaped"
    assert "@import" not in text
    assert "url(http" not in text
    for title in ("Accuracy", "Loss", "KL", "Entropy", "Weights", "Gradient and learning rate", "Throughput", "Time"):
        assert f"<h2>{title}</h2>" in text
    assert "<h2>Memory</h2>" not in text
    assert text.count("<td>hpd/loss<small>") == 2, "in the summary and in all numbers, once for both runs"
    assert text.count(">ünïcode</small></td>") == text.count("b&gt;$x$</small></td>") > 2
    references = re.findall(r"url\(#([^)]*)\)", text)
    assert references
    assert set(references) <= set(found.ids)


def test_the_command_writes_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_run(tmp_path / "run.jsonl")
    main([str(log), "--out", str(tmp_path / "out.v1")])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.v1.html", "out.v1.png", "run.jsonl"]
    assert "10 values are not finite" in capsys.readouterr().out
    pixels = np.asarray(Image.open(tmp_path / "out.v1.png").convert("RGB"), dtype=float)
    assert pixels.std() > 10
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert str(ended.value.code).startswith("Error: RUN=")
    with pytest.raises(SystemExit) as ended:
        main([str(log), "--out", str(tmp_path / "no" / "such" / "out")])
    assert str(ended.value.code).startswith("Error: ")


def test_a_full_disk_leaves_the_page_that_was_there(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl", steps=3)
    page_before = tmp_path / "report.html"
    page_before.write_text("before")
    words = [sys.executable, "-m", "hpd_verl.tools.report", str(tmp_path), "--out", str(tmp_path / "report")]
    limited = f"ulimit -f 1; exec {shlex.join(words)}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"Error: .*cannot write .*report\.png \(File too large\); make room, or give another --out", last
    )
    assert page_before.read_text() == "before"
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "report.html"}


def test_a_run_of_one_step_and_one_unknown_metric_is_drawn(tmp_path: Path) -> None:
    run = Run("a", {"mine/score": {5: 1.0}})
    draw_picture([run], tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "mine/score" in page([run])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="the Debian package chromium is not installed")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Light and dark, on a desk and on a phone: text and curves are there, and nothing is wider than the screen."""
    runs = read_runs(
        [write_run(tmp_path / "a.jsonl"), write_run(tmp_path / "b.jsonl", slope=0.02)], ["first", "second"]
    )
    file = tmp_path / "report.html"
    wide = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    file.write_text(page(runs) + wide)

    def browse(*flags: str) -> str:
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, file.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout

    dom = browse("--dump-dom", "--window-size=500,900")
    for said in ("Training report", "val-core/addition/reward/mean@1", "first", "second", "12,346", "training step"):
        assert said in dom
    found = re.search(r"<title>(\d+) of (\d+)</title>", dom)
    assert found is not None
    assert int(found[1]) <= int(found[2]), "the page scrolls sideways on a phone"
    backgrounds = []
    for scheme in ("light", "dark"):
        shot = tmp_path / f"{scheme}.png"
        dark = () if scheme == "light" else ("--blink-settings=preferredColorScheme=0",)
        browse(f"--screenshot={shot}", "--window-size=1000,2400", *dark)
        pixels = np.asarray(Image.open(shot).convert("RGB"), dtype=float)
        backgrounds.append(pixels[2, 2].mean())
        assert pixels[:800].std() > 15, "the table is blank"
        assert pixels[1200:].std() > 8, "the figures are blank"
        blue = np.abs(pixels - np.array([0x1B, 0x87, 0xC9])).sum(-1) < 30
        assert blue[1000:].sum() > 300, "the first run's curves are missing"
    assert backgrounds[0] > 240
    assert backgrounds[1] < 40


@pytest.mark.slow
def test_without_matplotlib_one_line_says_so(tmp_path: Path) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; import hpd_verl.tools.report"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    assert run.stderr.strip() == (
        "Error: matplotlib is not installed; pip install 'hpd-verl[report]', or matplotlib itself"
    )
