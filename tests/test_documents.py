"""What the documents say is so: links lead somewhere, commands compose, settings, metrics and make targets exist."""

import functools
import importlib.util
import itertools
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import main_ppo_config, sft_config
from omegaconf import DictConfig, OmegaConf

from hpd_verl.checks.run import check_config, check_sft_config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "docs", "benchmarks", "tests/golden")
DOCUMENTS = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))

MAIN_PPO = "verl.trainer.main_ppo"
LEAN_COMMANDS = ("hpd_verl.sft.trainer", "hpd_verl.sft.fill_store")
MODELS = {
    "main_ppo": ["actor_rollout_ref.model.path=S", "actor_rollout_ref.ref.model.path=T", "data.train_files=x"],
    "lean": ["model.path=S", "teacher.model.path=T", "data.train_files=x"],
}
NODES = ("algorithm", "actor_rollout_ref", "data", "trainer", "teacher", "model", "engine", "optim", "checkpoint")
SETTING = re.compile(rf"`\+?((?:{'|'.join(NODES)})(?:\.\w+)+)[`=]")
OF_THE_EXAMPLE = {"algorithm.hpd.smoothed_label.smoothing"}
"""Of the objective that CONTRIBUTING.md adds."""
METRIC = re.compile(r"\b(?:hpd|timing_s)/[a-z_0-9]+")


@functools.cache
def composed(trainer: str, *overrides: str) -> DictConfig:
    config: DictConfig = (main_ppo_config if trainer == "main_ppo" else sft_config)(*overrides)
    return config


def commands(document: Path) -> list[list[str]]:
    """The words of each command that a code block holds, comments left out."""
    found, text = [], document.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if re.match(r" {4,}(VERL_PLATFORM=cpu )?(python|torchrun|bash|make|pip|pytest|ruff) ", line):
            found.append(shlex.split(line, comments=True))
    return found


def run_commands(document: Path) -> list[tuple[str, list[str]]]:
    """Module and overrides of each command that trains or fills the store."""
    found = []
    for words in commands(document):
        if "-m" in words and words[words.index("-m") + 1] in (MAIN_PPO, *LEAN_COMMANDS):
            module, *arguments = words[words.index("-m") + 1 :]
            found.append((module, [each for each in arguments if each != "algorithm=hpd"]))
    return found


def has(config: DictConfig, setting: str) -> bool:
    *path, last = setting.split(".")
    node = OmegaConf.select(config, ".".join(path))
    return isinstance(node, DictConfig) and last in node


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.strip("# ").lower()).replace(" ", "-")


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if not link.startswith("http")]
    dead = []
    for link in links:
        name, _, place = link.partition("#")
        file = document.parent / name if name else document
        headings = re.findall(r"^#+ .*$", file.read_text(), re.MULTILINE) if place and file.exists() else []
        if not file.exists() or (place and place not in map(anchor, headings)):
            dead.append(link)
    assert dead == []


@each_document
def test_named_files_exist(document: Path) -> None:
    """In the repository, in the package or beside the document."""
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|md|sh|yaml|npz))`", document.read_text()))
    places = (ROOT, ROOT / "hpd_verl", document.parent)
    assert sorted(name for name in named if not any((place / name).exists() for place in places)) == []


def test_tests_that_the_package_names_exist() -> None:
    text = "".join(file.read_text() for file in [*ROOT.glob("hpd_verl/**/*.py"), *ROOT.glob("benchmarks/*.py")])
    named = set(re.findall(r"tests/[\w/]+\.py", text))
    assert named
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


@each_document
def test_files_and_modules_exist(document: Path) -> None:
    for words in commands(document):
        for flag, module in itertools.pairwise(words):
            if flag == "-m" and words[0] != "pytest":
                assert importlib.util.find_spec(module) is not None, module
        for word in words:
            if word.endswith((".py", ".sh")):
                assert (ROOT / word).is_file(), word


RUNS = [run for document in DOCUMENTS for run in run_commands(document)]


@pytest.mark.parametrize(("module", "overrides"), RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_commands_pass_the_check(module: str, overrides: list[str]) -> None:
    if module == MAIN_PPO:
        check_config(composed("main_ppo", *overrides))
    else:
        cache = ["algorithm.hpd.teacher_cache=disk"] if module == "hpd_verl.sft.fill_store" else []
        check_sft_config(composed("lean", *overrides, *cache), fills_store=bool(cache))


def test_the_readme_has_the_commands() -> None:
    modules = [module for module, _ in run_commands(ROOT / "README.md")]
    assert modules == [MAIN_PPO, MAIN_PPO, "hpd_verl.sft.trainer"]


@each_document
def test_settings_exist(document: Path) -> None:
    named = set(SETTING.findall(document.read_text()))
    configs = [composed(trainer, *overrides) for trainer, overrides in MODELS.items()]
    named = {setting for setting in named if not setting.endswith(".py")} - OF_THE_EXAMPLE
    assert sorted(setting for setting in named if not any(has(config, setting) for config in configs)) == []


def test_additions_of_the_readme_pass_the_check() -> None:
    table = (ROOT / "README.md").read_text().split("**Then**")[1].split("\n## ")[0]
    additions = [shlex.split(code) for line in table.splitlines() for code in line.split("`")[1::2]]
    assert len(additions) == 7
    for addition in additions:
        check_config(composed("main_ppo", *MODELS["main_ppo"], *addition))


def test_every_metric_is_explained() -> None:
    sources = [*(ROOT / "hpd_verl").rglob("*.py")]
    logged = {name for file in sources for name in re.findall(r"\"((?:hpd|timing_s)/[a-z_0-9]+)\"", file.read_text())}
    logged |= {f"hpd/teacher_cache_{name}" for name in ("rows", "gib")}  # whichever way they are written
    page = (ROOT / "docs/metrics.md").read_text()
    assert logged - set(METRIC.findall(page)) == set()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `hpd/")]
    table = {name for row in rows for name in METRIC.findall(row)}
    text = "".join(file.read_text() for file in sources)
    assert sorted(name for name in table if name not in logged and name not in text) == []


def test_flags_of_scripts_are_in_snake_case() -> None:
    """As verl's and Hydra's are."""
    scripts = [file for folder in ("benchmarks", "data_prep", "examples") for file in (ROOT / folder).rglob("*.py")]
    flags = {flag for file in scripts for flag in re.findall(r"add_argument\(\s*f?\"--([^\"]+)\"", file.read_text())}
    assert {"local_save_dir", "chunk_size"} <= flags
    assert sorted(flag for flag in flags if "-" in flag) == []


def test_the_workflow_runs_the_parts_of_make_test() -> None:
    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    prepares = "make debian"
    assert runs.count(prepares) == 2
    runs = [run for run in runs if run != prepares]
    targets = [run.split()[1] for run in runs]
    assert runs == [f"make {target} PYTHON=python" for target in targets]
    parts, whole = (
        [
            line
            for target in names
            for line in subprocess.run(
                ["make", "--dry-run", "--assume-old=.venv/installed", target],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()
            if re.search("ruff|mypy|pytest", line)
        ]
        for names in (targets, ["test"])
    )
    assert [line for line in whole if "pytest" not in line] == [line for line in parts if "pytest" not in line]
    (everything,) = (line for line in whole if "pytest" in line)
    selections = [line.removeprefix(everything).strip() for line in parts if "pytest" in line]
    assert selections == ['-m "not e2e"', "-m e2e"]
    for job in workflow["jobs"].values():
        container = job["container"]
        assert (container if isinstance(container, str) else container["image"]) == "python:3.11-bookworm"
        assert job["timeout-minutes"] > 0


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert "2604.20244" in citation["preferred-citation"]["url"]


def test_generated_pages_are_those_of_the_code() -> None:
    """Settings and objectives are documented by their declarations; ``python docs/generate.py`` writes the pages."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, make in generate.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == make(), f"docs/{name}: run python docs/generate.py"
