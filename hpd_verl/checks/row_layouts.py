"""Attention and packing of each model: chosen if unset, else checked."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig

from hpd_verl.checks.models import without_copies
from hpd_verl.checks.settings import on_cpu
from hpd_verl.engine.attention import FORMER_NAME, NAME
from hpd_verl.engine.causal_lm import check_head, offer_head
from hpd_verl.engine.replica import Replica, rope_switch
from hpd_verl.engine.row_layout import RowLayout, Tried, default_attentions, layouts, try_layouts
from hpd_verl.errors import one_line, require
from hpd_verl.teacher.model_config import teacher_model_config, teacher_name

logger = logging.getLogger(__name__)

ATTENTION = "override_config.attn_implementation"
PACKING = "use_remove_padding"
AUTO = "auto"
"""Value of ``use_remove_padding``: packed rows if the model allows them, else padded."""


@dataclass(frozen=True)
class Passes:
    """Requirements of a run's passes on its models."""

    longest_row: int
    """Tokens of prompt and response."""
    one_pass: bool
    """The pipeline reads hidden states in front of the output layer."""
    ulysses: str = ""
    """The setting, with its value, by which ranks share sequences out; empty where they do not."""
    one_row: str = ""
    """The settings by which each micro-batch has one row."""
    fixed_rows: str | None = None
    """The setting, with its value, that gives each micro-batch the same number of rows; None where tokens do."""
    rows_share: bool = True
    """A micro-batch may hold more than one row."""


@dataclass(frozen=True)
class ModelNode:
    """A model's node in the configuration, and what its settings are called."""

    name: str
    """As ``actor_rollout_ref.model``."""
    node: DictConfig
    """The teacher's includes what it inherits from the student."""
    own: DictConfig
    """As it is written, without that."""

    def is_set(self, key: str) -> bool:
        return OmegaConf.select(self.own, key) not in (None, AUTO)

    def get(self, key: str) -> Any:
        return OmegaConf.select(self.node, key)


def model_nodes(student: DictConfig, teachers: Mapping[str, DictConfig], names: Sequence[str]) -> list[ModelNode]:
    """The models of a run: the student, and its teachers, if any.

    Args:
        student: its node.
        teachers: their nodes, of ``teacher_nodes``.
        names: of the student's node and of a single teacher's.
    """
    nodes = [ModelNode(names[0], student, student)]
    for name, teacher in teachers.items():
        if teacher.get("path"):
            called = teacher_name(name, names[1])
            nodes.append(ModelNode(called, teacher_model_config(student, teacher), teacher))
    return nodes


def choose_row_layout(model: ModelNode, passes: Passes) -> RowLayout:
    """The layout by which this model computes each row as it does alone.

    What is set for this model is taken or refused, never changed. What the teacher takes from the student is preferred.

    Raises:
        ValueError: what is set is wrong for this model, or nothing that is known is right.
    """
    packing = model.get(PACKING)
    require(
        not passes.ulysses or packing is not False,
        f"{model.name}.{PACKING}",
        packing,
        f"{passes.ulysses} shares out packed rows; leave it out, or that",
    )
    attention = str(model.get(ATTENTION))
    require(
        not passes.ulysses or attention in ("None", NAME, FORMER_NAME) or attention.startswith("flash"),
        f"{model.name}.{ATTENTION}",
        attention,
        f"with {passes.ulysses} each rank would see its own part of a sequence alone; leave it out",
    )
    require(
        not (on_cpu() and attention.startswith("flash")),
        f"{model.name}.{ATTENTION}",
        attention,
        "flash attention needs a GPU; leave it out",
    )
    config = _hf_config(model)
    if passes.ulysses and hasattr(config, "vision_config"):  # verl slices the inputs of such models by their names
        raise ValueError(f"{passes.ulysses}: {_called(model)} is a model of images too; leave it out")
    _check_rope(config, model, passes)
    candidates = _candidates(model, passes)
    try:
        tried = _tried(config, candidates, model, passes)
    except Exception as error:  # a replica that is large too, or whatever a model file raises at sizes of its own
        if passes.ulysses:
            raise ValueError(
                f"{passes.ulysses}: {_called(model)} cannot be tried before it loads ({one_line(error)}), and only a "
                "trial tells whether it can be shared out; leave it out"
            ) from error
        # Eager attention, the last, is the one that no family computes wrongly or ignores.
        layout = next((each for each in reversed(candidates) if not each.packed), candidates[-1])
        logger.warning("%s: %s, not tried before it loads: %s", _called(model), layout, one_line(error))
        _check_offload(model, layout)
        return layout
    if tried.right is None:
        raise ValueError(_refusal(config, model, passes, tried))
    if tried.wrong:
        _say(f"{_called(model)}: {_explained(tried)}")
    if passes.one_pass:
        _check_output_layer(config, model, passes)
    _check_offload(model, tried.right)
    return tried.right


@functools.cache
def _say(line: str) -> None:
    """Log a line once in a process: what is checked at its start is chosen again where the models load."""
    logger.info("%s", line)


def write_row_layout(model: ModelNode, layout: RowLayout) -> None:
    """Write a layout into a model's own node, for all that reads it from here on."""
    with open_dict(model.own):
        OmegaConf.update(model.own, ATTENTION, layout.attention, force_add=True)
        model.own[PACKING] = layout.packed


def _tried(config: Any, candidates: list[RowLayout], model: ModelNode, passes: Passes) -> Tried:
    asked = (passes.longest_row, passes.rows_share, bool(passes.ulysses), bool(model.get("trust_remote_code")))
    return try_layouts(config, candidates, *asked)


def _called(model: ModelNode) -> str:
    return f"{model.name}.path={model.get('path')}"


def _hf_config(model: ModelNode) -> Any:
    node = without_copies(model.node)
    node.load_tokenizer = False
    loaded: HFModelConfig = omega_conf_to_dataclass(node)
    return loaded.hf_config


def _candidates(model: ModelNode, passes: Passes, ignores_settings: bool = False) -> list[RowLayout]:
    free = ignores_settings or not model.is_set(ATTENTION)
    attentions = ([] if ignores_settings else [model.get(ATTENTION)]) + (
        default_attentions(bool(passes.ulysses)) if free else []
    )
    packing = None if ignores_settings or model.get(PACKING) == AUTO else model.get(PACKING)
    names, packing = list(dict.fromkeys(filter(None, attentions))), True if passes.ulysses else packing
    found = list(layouts(names, packing))
    if packing is None or passes.ulysses or model.is_set(PACKING):
        return found
    return found + list(layouts(names, not packing))  # the student's setting is preferred, not asked for


def _check_rope(config: Any, model: ModelNode, passes: Passes) -> None:
    switch = rope_switch(config)
    if switch is not None and passes.longest_row > switch and passes.ulysses:
        raise ValueError(
            f"{passes.ulysses}: {_called(model)} takes other rotary factors for rows of more than {switch} tokens, "
            "which a rank with a part of a row cannot tell; leave it out, or keep data.max_prompt_length + "
            f"data.max_response_length at {switch}"
        )
    if switch is not None and passes.longest_row > switch and passes.fixed_rows is not None and passes.rows_share:
        raise ValueError(
            f"{passes.fixed_rows}: one row of more than {switch} tokens changes the rotary factors of all rows of "
            f"its micro-batch in {_called(model)}; give 1, or leave it out"
        )


def _check_offload(model: ModelNode, layout: RowLayout) -> None:
    require(
        layout.packed or not model.get("enable_activation_offload"),
        f"{model.name}.enable_activation_offload",
        True,
        f"{_called(model)} needs padded rows, and verl's activation offloading gives wrong gradients with them; set "
        "it to false",
    )


def _explained(tried: Tried) -> str:
    reasons = "; ".join(f"{layout}: {reason}" for layout, reason in tried.wrong.items())
    assert tried.right is not None
    costs = "" if tried.right.packed else ". Each row of a micro-batch costs as much as its longest"
    return f"{tried.right}, since a trial found {reasons}{costs}"


def _refusal(config: Any, model: ModelNode, passes: Passes, tried: Tried) -> str:
    """The line that says what is set wrongly and what is right, or that nothing is."""
    layout, reason = next(iter(tried.wrong.items()))
    set_here = [f"{model.name}.{key}={model.get(key)}" for key in (ATTENTION, PACKING) if model.is_set(key)]
    found = f"{layout} does not compute each row as it is alone ({reason})"
    other = _tried(config, _candidates(model, passes, ignores_settings=True), model, passes).right
    if set_here and other is not None:
        return f"{' '.join(set_here)}: with {_called(model)}, {found}; leave it out for {other}"
    if passes.ulysses:
        return f"{passes.ulysses}: {_called(model)}: {found}; leave it out, or choose another model"
    tried_all = ", ".join(sorted({each.attention for each in tried.wrong}))
    return (
        f"{_called(model)}: {found}, nor does any other ({tried_all}, packed or padded); choose another model, or one "
        f"row a micro-batch: {passes.one_row}"
    )


def _check_output_layer(config: Any, model: ModelNode, passes: Passes) -> None:
    """Refuse a model whose output layer is not understood, by its replica."""
    replica = Replica(config, passes.longest_row, bool(model.get("trust_remote_code"))).model("eager")
    try:
        offer_head(replica)
        check_head(replica)
    except ValueError as error:
        raise ValueError(f"{_called(model)}: {error}") from error
