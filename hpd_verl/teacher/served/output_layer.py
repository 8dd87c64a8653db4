"""The teacher's output layer alone, from the files of its model: its weight [V, d] and bias."""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from verl.workers.config import HFModelConfig

from hpd_verl.engine.saved_model import weight_names
from hpd_verl.errors import Refused, one_line
from hpd_verl.teacher.store.teacher_files import find_file


def output_layer(model: HFModelConfig, setting: str, read: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, as they are in the files.

    Args:
        model: the teacher's; of the hub, the one file that is needed is fetched.
        setting: the name of its path.
        read: or only look whether they can be.

    Raises:
        Refused: they are not there, or are no plain floating-point matrix.
    """
    said = f"{setting}={model.path}"
    config = plain_config(model.hf_config)
    names = weight_names(config, model.trust_remote_code)
    places = _places(str(model.local_path), said)
    text = config.get_text_config()
    found = None
    if names is not None:
        found = _of(places, names[0]) or (_of(places, names[1]) if text.tie_word_embeddings else None)
    if names is None or found is None:
        raise Refused(
            f"{said}: no output layer in its safetensors files"
            + (f" ({names[0]})" if names else "")
            + "; the student's ranks need it beside the server's hidden states: give a folder that has it"
        )
    try:
        with safe_open(places[found](), "pt") as tensors:
            part = tensors.get_slice(found)
            shape, kind = part.get_shape(), part.get_dtype()
            expected = [text.vocab_size, text.hidden_size]
            if kind not in ("F32", "BF16", "F16") or len(shape) != 2 or shape[1] != expected[1] or shape[0] < 1:
                raise Refused(
                    f"{said}: its output layer {found} is {kind} {' x '.join(map(str, shape))} where "
                    f"{' x '.join(map(str, expected))} in floating point is needed; give the files of the unquantised "
                    "model"
                )
            weight = tensors.get_tensor(found) if read else None
        bias_name = _of(places, names[0].removesuffix("weight") + "bias")
        bias = None
        if bias_name is not None and read:
            with safe_open(places[bias_name](), "pt") as tensors:
                bias = tensors.get_tensor(bias_name)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{said}: its output layer cannot be read ({one_line(error)}); copy the file again") from error
    return weight, bias


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """A model's configuration without its quantisation, which is the server's business."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _places(source: str, said: str) -> dict[str, Any]:
    """Names of all tensors in a model's files, with what gives the file of each."""
    single = find_file(source, SAFE_WEIGHTS_NAME)
    if single is not None:
        with safe_open(single, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), lambda: single)
    index = find_file(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise Refused(
            f"{said}: no {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} there; give the teacher's folder, of which "
            "the file with its output layer is needed beside the server"
        )

    def of_shard(name: str) -> Path:
        file = find_file(source, name)
        if file is None:
            raise Refused(f"{said}: {name}, which holds its output layer, is missing; copy it from the teacher")
        return file

    try:
        weights = json.loads(index.read_bytes())["weight_map"]
        return {str(name): (lambda shard=str(shard): of_shard(shard)) for name, shard in weights.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Refused(f"{said}: {index.name} is no index of weights; copy it again") from error


def _of(places: dict[str, Any], name: str) -> str | None:
    """A tensor by its name, or by the one that ends alike: files of some families have other prefixes."""
    if name in places:
        return name
    end = ".".join(name.split(".")[-2:])
    alike = [each for each in places if each == end or each.endswith(f".{end}")]
    return alike[0] if len(alike) == 1 else None
