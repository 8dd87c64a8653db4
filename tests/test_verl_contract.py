"""The contract with verl: what is relied on is as it was, and all that is relied on is in it."""

import ast
import difflib
from typing import Any

import pytest
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine_workers import TrainingWorker
from verl_contract import (
    HELD,
    ROOT,
    SNAPSHOT,
    Text,
    attributes_in,
    of_class,
    of_itself,
    relied_on,
    resolve,
    snapshot,
    source,
    texts,
)

from hpd_verl.ppo.trainer import HPDTrainer


def test_names_of_verl_are_those_of_the_snapshot() -> None:
    """A failure after an upgrade of verl says what changed; after a change here, what is relied on now."""
    before, now = SNAPSHOT.read_text().splitlines(), snapshot().splitlines()
    changed = [line for line in difflib.unified_diff(before, now, lineterm="", n=0) if line[0] in "+-"][2:]
    assert not changed, "\n".join(
        ["verl_contract.txt has other names: look at each, then write it by python tests/verl_contract.py", *changed]
    )


@pytest.mark.parametrize("each", list(texts()), ids=lambda each: f"{each.place}: {each.text}")
def test_texts_of_verl_are_there_and_used(each: Text) -> None:
    said = f"{each.place} does not contain {each.text} any more. Used in hpd_verl/{each.used_in}: {each.why}"
    assert each.text in source(resolve(each.place)), said
    assert each.used in (ROOT / each.used_in).read_text(), f"hpd_verl/{each.used_in} does not use {each.used}"


def test_held_objects_are_there() -> None:
    for file, expression in HELD:
        found = {
            ast.unparse(node) for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.expr)
        }
        assert expression in found, f"hpd_verl/{file} has no {expression}"


def test_a_renamed_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are other parameters and another body."""
    lines = of_class(HPDTrainer)
    (balance,) = (line for line in lines if "._balance_batch(" in line)
    owner = resolve(balance.split("._balance_batch")[0])
    original = owner._balance_batch

    def other(self: Any, batch: Any, metrics: Any) -> Any:
        return original(self, batch, metrics)

    monkeypatch.setattr(owner, "_balance_batch", other)
    assert any("._balance_batch(self, batch, metrics) " in line for line in of_class(HPDTrainer) - lines)
    assert balance not in of_class(HPDTrainer)
    monkeypatch.delattr(owner, "_balance_batch")
    monkeypatch.setattr(owner, "_balance_rows", original, raising=False)
    assert balance not in of_class(HPDTrainer)
    assert issubclass(PPOTrainerSync, owner)


def test_a_subclass_with_an_unlisted_name_is_seen() -> None:
    """An overridden method, attributes that are set and read, and one that verl does not have."""

    class Careless(TrainingWorker):
        def _postprocess_output(self, output: Any, **kwargs: Any) -> Any:
            self.flops_counter = None
            return self.profiler_tool_config, self.of_nobody

    assert relied_on(Careless) == {"_postprocess_output", "flops_counter", "profiler_tool_config", "of_nobody"}
    assert {line for line in of_class(Careless) if "nowhere" in line} == {
        f"{Careless.__qualname__}.of_nobody is nowhere in verl"
    }


def test_nothing_is_nowhere() -> None:
    assert "nowhere" not in SNAPSHOT.read_text()


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
    private = {
        (file.relative_to(ROOT), node.attr)
        for file, node in nodes
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not of_itself(node.value)
    }
    listed = {line.partition("(")[0].split(":")[1].rpartition(".")[2] for line in SNAPSHOT.read_text().splitlines()}
    assert attributes_in("a._b") == {"_b"}
    assert not [f"{file}: {name}" for file, name in private if name not in listed | defined and name[:2] != "__"]
