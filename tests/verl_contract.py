"""All that this package relies on in verl beyond its registries and documented calls.

Names, signatures and bodies are read from our own code and the installed verl. What they were when the code was written
is in verl_contract.txt, a line a name: ``module:Class.name(parameters) digest of its body: files of ours``. Why a class
overrides or reads something stands there. What has no name is in verl_texts.txt, written by hand.

    python tests/verl_contract.py        writes verl_contract.txt; read what has changed in it

tests/test_verl_contract.py compares. Names of what patches replace are in ``cpu.patches``, with tests of their own.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import os
import pkgutil
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VERL_PLATFORM", "cpu")  # where this is run as a command

import hydra  # noqa: F401 - before hpd_verl.hydra_config, which registers with it
import verl  # noqa: F401 - loads the plugin
from verl.plugin.platform.platform_base import PlatformBase

import hpd_verl

ROOT = Path(hpd_verl.__file__).parent
SNAPSHOT = Path(__file__).with_suffix(".txt")


class Text(NamedTuple):
    """What has no name to look up, as verl's source has it."""

    used_in: str
    """File of this package."""
    place: str
    """Of verl's: ``module``, ``module:function`` or ``module:Class.method``."""
    why: str
    text: str
    """Of the source of ``place``."""
    used: str
    """Of the source of ``used_in``."""


_WORKER = "verl.workers.engine_workers:ActorRolloutRefWorker"
_TRAINING_WORKER = "verl.workers.engine_workers:TrainingWorker"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"

HELD = {
    ("engine/student_checkpoints.py", "engine"): "hpd_verl.engine.head_engine:HeadEngine",
    ("engine/student_checkpoints.py", "self.engine"): "hpd_verl.engine.head_engine:HeadEngine",
    ("hydra_config.py", "ConfigSource"): "hydra.plugins.config_source:ConfigSource",
    ("engine/families.py", "model"): "transformers:PreTrainedModel",
    ("engine/row_layout.py", "model"): "transformers:PreTrainedModel",
    ("pipelines/one_pass.py", "self.student"): "hpd_verl.pipelines.one_pass:StudentWorker",
    ("pipelines/staged.py", "student"): _TRAINING_WORKER,
    ("pipelines/updates.py", "student"): _TRAINING_WORKER,
    ("ppo/queue_batch.py", "self.student"): _WORKER,
    ("ppo/queue_batch.py", "self.teacher"): _WORKER,
    ("ppo/trainer.py", "self.actor_rollout_wg"): "verl.single_controller.base.worker_group:WorkerGroup",
    ("ppo/worker.py", "self.actor"): _TRAINING_WORKER,
    ("ppo/worker.py", "self.actor.engine"): _ENGINE,
    ("sft/trainer.py", "handler"): "verl.utils.checkpoint.checkpoint_handler:CheckpointHandler",
    ("sft/trainer.py", "self.engine"): "hpd_verl.engine.head_engine:HeadEngine",
    ("teacher/colocated.py", "self.worker"): "hpd_verl.teacher.colocated:TeacherWorker",
}
"""Expressions of files of ours that are objects of others' classes; of classes that are not verl's, private names."""


def texts() -> Iterator[Text]:
    """Of verl_texts.txt."""
    file = place = why = ""
    for line in Path(__file__).with_name("verl_texts.txt").read_text().splitlines():
        words = line.strip()
        if line.startswith("    "):
            text, _, used = words.partition(" -> ")
            yield Text(file, place, why, text, used or text)
        elif line.startswith("  "):
            place, why = words.split(": ", 1)
        elif not line.startswith("#"):
            file = words


# What our code takes of verl


def resolve(place: str) -> Any:
    """The object that ``module`` or ``module:qualified.name`` stands for."""
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return functools.reduce(getattr, name.split(".") if name else [], found)


@functools.cache
def source(found: Any) -> str:
    """The source text of a module, class or function; of a Ray actor class, that of the class itself."""
    return inspect.getsource(inspect.unwrap(found))


def described(place: str, found: Any) -> str:
    """A name with what it takes, and a digest of a function's body."""
    if not callable(found):
        return place
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of what C implements
        return place
    names = ", ".join(stars.get(each.kind, "") + name for name, each in signature.parameters.items())
    body = "" if inspect.isclass(found) else f" {hashlib.sha256(source(found).encode()).hexdigest()[:8]}"
    return f"{place}({names}){body}"


@functools.cache
def attributes_in(text: str) -> set[str]:
    """Names of all attributes that a source text reads or sets, those of ``getattr(.., "name")`` included."""
    return {name for _, name, _ in _attributes(ast.parse(textwrap.dedent(text)))}


def _attributes(tree: ast.AST) -> Iterator[tuple[ast.expr, str, bool]]:
    """``(object, name, whether it is set)`` of all attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.value, node.attr, isinstance(node.ctx, ast.Store)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            yield node.args[0], ast.unparse(node.args[1]).strip("'"), False


def is_verls(each: type) -> bool:
    return each.__module__.split(".")[0] == "verl"


def classes() -> list[type]:
    """Our classes that inherit from one of verl's."""
    names = [module.name for module in pkgutil.walk_packages(hpd_verl.__path__, "hpd_verl.")]
    found = {
        each
        for module in (importlib.import_module(name) for name in names if name != "hpd_verl.plugin")
        for each in vars(module).values()
        if inspect.isclass(each)
        and each.__module__ == module.__name__
        and any(map(is_verls, each.__mro__))
        and not issubclass(each, PlatformBase)  # verl's plugin interface, all of it public and abstract
    }
    return sorted(found, key=lambda each: each.__qualname__)


def of_itself(node: ast.expr) -> bool:
    """Whether an expression is ``self``, ``cls``, an object that ``cls(...)`` made, or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "manager")


def uses(each: type) -> tuple[set[str], set[str]]:
    """Attributes of itself that a class reads, and those that it defines or sets."""
    own = [use for use in _attributes(ast.parse(textwrap.dedent(source(each)))) if of_itself(use[0])]
    return {name for _, name, is_set in own if not is_set}, {name for _, name, is_set in own if is_set} | set(
        vars(each)
    )


def relied_on(each: type) -> set[str]:
    """Names of verl's that a class of ours overrides, sets or reads."""
    ours = [base for base in each.__mro__ if base.__module__.startswith("hpd_verl")]
    verls = [base for base in each.__mro__ if is_verls(base)]
    names_of_verl = set().union(*(set(vars(base)) | attributes_in(source(base)) for base in verls))
    read, written = uses(each)
    defined = set().union(*(uses(base)[1] for base in ours))
    found = (written & names_of_verl) | (read - defined)
    dunders = {name for name in found if name.startswith("__") and name not in ("__init__", "__getitem__")}
    return found - dunders - {"_abc_impl"}


def owned(bases: list[type], name: str) -> str | None:
    """A name by the first class that has it, or whose source mentions it; None where none does."""
    has = next((base for base in bases if name in vars(base)), None)
    if has is not None:
        return described(f"{has.__module__}:{has.__qualname__}.{name}", getattr(has, name))
    mentions = next((base for base in bases if name in attributes_in(source(base))), None)
    return None if mentions is None else f"{mentions.__module__}:{mentions.__qualname__}.{name}"


def of_class(each: type) -> set[str]:
    """What a class of ours overrides, sets and reads of verl's."""
    verls = [base for base in each.__mro__ if is_verls(base)]
    return {owned(verls, name) or f"{each.__qualname__}.{name} is nowhere in verl" for name in relied_on(each)}


def of_held(file: str, tree: ast.AST) -> set[str]:
    """What a file takes of objects of others' classes."""
    found = set()
    for value, name, _ in _attributes(tree):
        held = HELD.get((file, ast.unparse(value)))
        if held is None:
            continue
        bases = [base for base in resolve(held).__mro__ if base is not object]
        others = [base for base in bases if not base.__module__.startswith("hpd_verl")]
        ours = set().union(*(uses(base)[1] for base in bases if base not in others))
        if name not in ours and (name.startswith("_") or any(map(is_verls, others))):
            # A public one that is nowhere is bound as the program runs, as a worker's methods to its group.
            found.add(owned(others, name) or (f"{held}.{name} is nowhere" if name.startswith("_") else ""))
    return found - {""}


def of_imports(tree: ast.AST) -> set[str]:
    """What a file imports from verl, and takes of modules of verl's."""
    found, modules = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "verl":
            for name in node.names:
                place = f"{node.module}:{name.name}"
                imported = importlib.import_module(str(node.module))
                what = getattr(imported, name.name, None)
                if what is None:
                    what = importlib.import_module(f"{node.module}.{name.name}")
                if inspect.ismodule(what):
                    modules[name.asname or name.name] = what
                else:
                    found.add(described(place, what))
    for value, attribute, _ in _attributes(tree):
        module = modules.get(ast.unparse(value))
        if module is not None:
            found.add(described(f"{module.__name__}:{attribute}", getattr(module, attribute)))
    return found


def snapshot() -> str:
    """All names of verl's that our code relies on, a line each, as they are installed."""
    found: dict[str, set[str]] = defaultdict(set)
    for each in classes():
        for line in of_class(each):
            found[line].add(str(Path(inspect.getfile(each)).relative_to(ROOT)))
    for path in sorted(ROOT.rglob("*.py")):
        file, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text())
        for line in of_held(file, tree) | of_imports(tree):
            found[line].add(file)
    return "".join(f"{line}: {', '.join(sorted(files))}\n" for line, files in sorted(found.items()))


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
