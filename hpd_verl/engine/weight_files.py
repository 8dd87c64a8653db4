"""Which files transformers would load a model's weights from."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The names of an adapter's weights, in the order in which peft looks."""


def weight_files(
    model: str, find: Callable[[str], Path | None], explicit: str | None = None
) -> tuple[Path | None, dict[str, set[str]]]:
    """The index of a model's weights, where there is one, and the names of their files, which may be missing then.

    Args:
        model: SETTING=VALUE, for messages.
        find: a file of the model by its name; None where it has none.
        explicit: ``transformers_weights`` of the model's configuration: it is loaded in place of the usual names.

    Returns:
        ``(index, tensors)``: the second has for each file the tensors that the index expects there.

    Raises:
        ValueError: there are no weights, or their index cannot be read.
    """
    # In transformers' order.
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    for name in names if explicit is None else (explicit,):
        found = find(name)
        if found is None:
            continue
        if not name.endswith(".json"):
            return None, {name: set()}
        tensors: dict[str, set[str]] = {}
        try:
            for tensor, file in json.loads(found.read_bytes())["weight_map"].items():
                tensors.setdefault(file, set()).add(tensor)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{model}: {name} is not an index of weights; copy or download the model again") from None
        return found, tensors
    wanted = f"{SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, whole or in parts with their index"
    raise ValueError(f"{model}: no weights there; give a model with {explicit or wanted}")


def in_folder(folder: Path) -> Callable[[str], Path | None]:
    """``find`` of ``weight_files`` for a model in a folder."""
    return lambda name: folder / name if (folder / name).is_file() else None
