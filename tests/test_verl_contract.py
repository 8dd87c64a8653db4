"""The contract with verl: each entry against the installed verl, and that whatever is relied on has an entry."""

import ast
import functools
import importlib
import inspect
import pkgutil
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra  # noqa: F401 - before hpd_verl.hydra_config, which registers with it
import pytest
import verl  # noqa: F401 - loads the plugin
from verl.plugin.platform.platform_base import PlatformBase
from verl_contract import CONTRACT, Attribute, Entry, Method, Text

import hpd_verl

ROOT = Path(hpd_verl.__file__).parent


def resolve(place: str) -> Any:
    """The object that ``module`` or ``module:qualified.name`` stands for."""
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return functools.reduce(getattr, name.split(".") if name else [], found)


def source(place: Any) -> str:
    """The source text of a module, class or function; of a Ray actor class, that of the class itself."""
    return inspect.getsource(inspect.unwrap(place))


def parameters(function: Any) -> str:
    """Names of a function's parameters with their stars, as a signature without annotations and defaults."""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        stars.get(parameter.kind, "") + name for name, parameter in inspect.signature(function).parameters.items()
    )


def attributes_in(text: str) -> set[str]:
    """Names of all attributes that a source text reads or sets, those of ``getattr(.., "name")`` included."""
    nodes = list(ast.walk(ast.parse(textwrap.dedent(text))))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and len(node.args) > 1]
    by_name = [node.args[1] for node in calls if ast.unparse(node.func) in ("getattr", "hasattr")]
    return names | {str(node.value) for node in by_name if isinstance(node, ast.Constant)}


def broken(entry: Entry) -> str | None:
    """What of verl is not as the entry says; None where all is."""
    place, _, name = entry.place.rpartition(".") if isinstance(entry, Method | Attribute) else (entry.place, "", "")
    try:
        owner = resolve(place)
        found = getattr(owner, name) if isinstance(entry, Method) else owner
    except (ImportError, AttributeError) as error:
        return f"{entry.place} is gone ({error})"
    if isinstance(entry, Method):
        now = parameters(found)
        return None if now == entry.parameters else f"{entry.place} takes ({now}), and not ({entry.parameters})"
    if isinstance(entry, Attribute):
        bases = [each for each in inspect.getmro(owner) if each is not object]
        known = hasattr(owner, name) or any(name in attributes_in(source(each)) for each in bases)
        return None if known else f"{entry.place} is gone: {place} neither sets nor reads an attribute of that name"
    assert isinstance(entry, Text)
    return None if entry.text in source(found) else f"{entry.place} does not contain {entry.text} any more"


@pytest.mark.parametrize("entry", CONTRACT, ids=lambda entry: entry.name)
def test_verl_is_as_expected(entry: Entry) -> None:
    """A failure here after an upgrade of verl says what changed, where it is used and what for."""
    found = broken(entry)
    assert found is None, f"{found}. Used in hpd_verl/{entry.used_in}: {entry.why}"


def test_entries_are_used_where_they_say() -> None:
    for entry in CONTRACT:
        word = entry.used if isinstance(entry, Text) else entry.place.rpartition(".")[2]
        assert word in (ROOT / entry.used_in).read_text(), f"hpd_verl/{entry.used_in} does not use {word}"


def test_no_entry_is_there_twice() -> None:
    names = [(entry.name, entry.used_in) for entry in CONTRACT]
    assert len(names) == len(set(names))


# Completeness


def modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.walk_packages(hpd_verl.__path__, "hpd_verl.")]
    return [importlib.import_module(name) for name in names if not name.endswith(("plugin", "cpu.attention"))]


def is_verls(each: type) -> bool:
    return each.__module__.split(".")[0] == "verl"


def subclasses() -> list[type]:
    """Our classes that inherit from one of verl's."""
    found = {
        each
        for module in modules()
        for each in vars(module).values()
        if inspect.isclass(each)
        and each.__module__ == module.__name__
        and any(map(is_verls, each.__mro__))
        and not issubclass(each, PlatformBase)  # verl's plugin interface, all of it public and abstract
    }
    return sorted(found, key=lambda each: each.__qualname__)


def listed() -> set[tuple[str, str]]:
    """``(module:Class, name)`` of all methods and attributes of the contract."""
    places = [entry.place.rpartition(".") for entry in CONTRACT if isinstance(entry, Method | Attribute)]
    return {(owner, name) for owner, _, name in places}


def of_itself(node: ast.expr) -> bool:
    """Whether an expression is ``self``, ``cls``, an object that ``cls(...)`` made, or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "manager")


def uses(each: type) -> tuple[set[str], set[str]]:
    """Attributes of itself that a class reads, and those that it defines or sets."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
    own = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and of_itself(node.value)]
    read = {node.attr for node in own if isinstance(node.ctx, ast.Load)}
    return read, {node.attr for node in own if isinstance(node.ctx, ast.Store)} | set(vars(each))


def unlisted(each: type) -> set[str]:
    """Names of verl's that a class of ours overrides, sets or reads, and that the contract lacks."""
    ours = [base for base in each.__mro__ if base.__module__.startswith("hpd_verl")]
    verls = [base for base in each.__mro__ if is_verls(base)]
    names_of_verl = set().union(*(set(vars(base)) | attributes_in(inspect.getsource(base)) for base in verls))
    read, written = uses(each)
    defined = set().union(*(uses(base)[1] for base in ours))
    relied_on = (written & names_of_verl) | (read - defined)
    relied_on -= {name for name in relied_on if name.startswith("__") and name != "__init__"} | {"_abc_impl"}
    places = {f"{base.__module__}:{base.__qualname__}" for base in verls}
    return {name for name in relied_on if not any((place, name) in listed() for place in places)}


@pytest.mark.parametrize("each", subclasses(), ids=lambda each: each.__name__)
def test_what_a_subclass_relies_on_is_listed(each: type) -> None:
    """Whatever a class overrides, sets or reads of verl's class that it inherits from."""
    missing = unlisted(each)
    assert not missing, f"{each.__qualname__} relies on {', '.join(sorted(missing))} of verl: list it in CONTRACT"


def test_a_subclass_with_an_unlisted_name_is_seen() -> None:
    """An overridden method, an attribute that is set, and one that is read."""
    from verl.workers.engine_workers import TrainingWorker

    class Careless(TrainingWorker):
        def _postprocess_output(self, output: Any, **kwargs: Any) -> Any:
            self.flops_counter = None
            return self.profiler_tool_config

    assert unlisted(Careless) == {"_postprocess_output", "flops_counter", "profiler_tool_config"}


def test_private_names_of_others_are_listed() -> None:
    """``object._name`` of anything but an object's own class, where no class or module here has that name."""
    trees = {file: ast.parse(file.read_text()) for file in ROOT.rglob("*.py")}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    defined = {
        node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    defined |= {node.attr for _, node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    slots = [
        node.value for _, node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__"
    ]
    defined |= {name for names in slots for name in ast.literal_eval(names)}
    private = [
        (file.relative_to(ROOT), node.attr)
        for file, node in nodes
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not of_itself(node.value)
    ]
    private += [
        (file.relative_to(ROOT), name.name)
        for file, node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("verl")
        for name in node.names
        if name.name.startswith("_")
    ]
    names = {name for _, name in listed()} | defined
    assert not [f"{file}: {name}" for file, name in private if name not in names and not name.startswith("__")]
