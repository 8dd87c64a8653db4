"""The rooms of the package: imports go downwards only, kernels know nothing of their surroundings."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "hpd_verl"

ORDER = [
    {"errors", "field_text"},
    {"objectives"},
    {"head"},
    {"config", "run", "several_teachers", "teacher_server"},
    {"data"},
    {"engine"},
    {"teacher"},
    {"checks"},
    {"pipelines"},
    {"ppo"},
    {"sft", "hydra_config"},
    {"tools"},
    {"command"},
    {"cpu"},
    {"plugin"},
]
"""From the bottom: a room may import those below it; of a level with several rooms, a room may import the others."""

KERNELS = {
    "objectives": {"torch", "pydantic"},
    "head": {"torch"},
    "tools.rewards": {"math_verify", "latex2sympy2_extended", "numpy", "sympy"},
}
"""Rooms and all that they may import beside the standard library and what is below them here."""


def modules() -> dict[str, Path]:
    """``hpd_verl.room.module`` to its file."""
    files = sorted(ROOT.rglob("*.py"))
    parts = {file: file.relative_to(ROOT.parent).with_suffix("").parts for file in files}
    return {".".join(part for part in parts[file] if part != "__init__"): file for file in files}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(module: str, text: str) -> set[str]:
    """Absolute names of all modules that a module imports, within functions too."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # A name is a module of the package, or something in it.
            found |= {each if (each := f"{origin}.{name.name}") in known else origin for name in node.names}
    return found


def violations(module: str, text: str) -> list[str]:
    """What a module of the package imports although it must not."""
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    own, wrong = room(module), []
    kernel = next((name for name in KERNELS if f"{module}.".startswith(f"hpd_verl.{name}.")), None)
    for imported in sorted(imports(module, text)):
        if imported.split(".")[0] == "hpd_verl":
            other = room(imported)
            if other and other != own and own and level[other] > level[own]:
                wrong.append(f"{module} imports {imported}: {own} is below {other}")
            elif kernel == "tools.rewards" and not imported.startswith(f"hpd_verl.{kernel}"):
                wrong.append(f"{module} imports {imported}: {kernel} knows nothing of the package")
        elif kernel and imported.split(".")[0] not in KERNELS[kernel] | sys.stdlib_module_names:
            wrong.append(f"{module} imports {imported}: {kernel} knows {KERNELS[kernel]} and what is below it only")
    return wrong


@pytest.mark.parametrize("module", modules())
def test_arrows_go_downwards(module: str) -> None:
    found = violations(module, modules()[module].read_text())
    assert not found, "; ".join(found)


def test_contributing_lists_the_rooms_in_their_order() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    rooms = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", text, re.MULTILINE)
    levels = [{rooms.pop() for _ in level} for level in ORDER]
    assert (levels, rooms) == (ORDER, [])


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {room(module) for module in modules()} - {""}
    assert rooms == set().union(*ORDER)
    assert sum(map(len, ORDER)) == len(rooms)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("hpd_verl.head.sampling", "from hpd_verl.config import HPDConfig"),
        ("hpd_verl.head.sampling", "from hpd_verl import config"),
        ("hpd_verl.head.sampling", "from ..config import HPDConfig"),
        ("hpd_verl.head.sampling", "def f():\n    import hpd_verl.data.fields"),
        ("hpd_verl.objectives", "from hpd_verl.head import sampling"),
        ("hpd_verl.objectives", "import verl.utils"),
        ("hpd_verl.head.sampling", "from transformers import AutoModel"),
        ("hpd_verl.head.sampling", "import omegaconf"),
        ("hpd_verl.pipelines.one_pass", "from hpd_verl.ppo.worker import HPDWorker"),
        ("hpd_verl.teacher.store.store", "if True:\n    from hpd_verl.checks.run import check_config"),
        ("hpd_verl.sft.trainer", "from hpd_verl.tools.plan.memory import plan_memory"),
        ("hpd_verl.tools.rewards.maths", "import torch"),
        ("hpd_verl.tools.rewards.maths", "from hpd_verl.config import HPDConfig"),
        ("hpd_verl.ppo.trainer", "from hpd_verl.sft.trainer import main"),
        ("hpd_verl.sft.trainer", "import hpd_verl.plugin"),
    ],
)
def test_a_violation_is_seen(module: str, text: str) -> None:
    """Of every form of import."""
    assert len(violations(module, text)) == 1


def test_no_circle_between_modules() -> None:
    known = modules()
    graph = {module: imports(module, file.read_text()) & known.keys() - {module} for module, file in known.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in known:
        visit(module, ())


def test_levels_of_logging_belong_to_the_entry_point() -> None:
    """One place sets the level of all of the package's loggers, in every process that imports verl."""
    setting = [module for module, file in modules().items() if ".setLevel(" in file.read_text()]
    assert setting == ["hpd_verl.plugin"]


def test_what_is_said_is_shown() -> None:
    """Lines of INFO reach the log where verl alone would lose them; verl's own setting hides them."""
    program = (
        "import logging, os, verl, hpd_verl.plugin\n"
        "logging.getLogger('hpd_verl.ppo.trainer').info('pipeline one_pass')\n"
        "os.environ['VERL_LOGGING_LEVEL'] = 'WARN'\n"
        "hpd_verl.plugin.register()\n"
        "logging.getLogger('hpd_verl.ppo.trainer').info('pipeline staged')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VERL_LOGGING_LEVEL"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert "pipeline one_pass" in run.stderr
    assert "pipeline staged" not in run.stderr
