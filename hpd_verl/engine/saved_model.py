"""A trained model as a folder of transformers, and the check that the folder holds the trained model.

``plain_model`` makes a transformers model of an engine's state: adapters are merged, an untied output layer is kept.
``LogProbs`` are the trained model's log-probs of a few token sequences; the written model must give the same.
"""

import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from verl.utils.model import get_hf_auto_model_class

from hpd_verl.run.checkpoint import read_json

logger = logging.getLogger(__name__)

LOG_PROBS = "log_probs.json"
"""File of a checkpoint with the trained model's ``LogProbs``."""
ADAPTER = "adapter_config.json"
"""File of a LoRA run's checkpoint with the adapter's settings, as peft writes it."""

_ATTENTION = "eager"
"""Right for every family: transformers' default drops the soft caps of Gemma 2."""

_OF_TRAINING = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_name_or_path")
"""Keys of a configuration that concern training only."""
_ADAPTER_SETTINGS = (
    *("r", "lora_alpha", "target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_bias"),
    *("layers_to_transform", "layers_pattern", "layer_replication"),
)
"""Settings of an adapter that say what its weights mean; others name code, or how it began."""
_ROW_LENGTHS = (24, 9, 17, 30)
"""Tokens of the sequences that log-probs are taken of: several, of several lengths, so that a pack is tried."""


class SavedModelError(RuntimeError):
    """The written model is not the trained model."""


# ------------------------------ log-probs ------------------------------


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of a few token sequences by a model."""

    rows: list[list[int]]
    """The sequences."""
    values: list[list[float]]
    """Log-probs of each token after a sequence's first."""
    dtype: str
    """Dtype of the model's matrix products: ``bfloat16``, ``float32``."""

    def write(self, file: Path) -> None:
        """Write them as JSON."""
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> "LogProbs | None":
        """The log-probs in a file; None without the file.

        Raises:
            ValueError: it holds something else.
        """
        if not file.is_file():
            return None
        content = read_json(file)
        rows: Any = content.get("rows")
        values: Any = content.get("values")
        dtype: Any = content.get("dtype")
        well_formed = (
            dtype in ("bfloat16", "float32", "float16")
            and _are_lists_of(rows, int)
            and _are_lists_of(values, float)
            and [len(row) - 1 for row in rows] == [len(row) for row in values]
            and sum(map(len, values)) > 0
        )
        if not well_formed:
            raise ValueError(f"{file.name} holds no log-probs of token sequences")
        return cls(rows, values, dtype)


def _are_lists_of(found: Any, kind: type) -> bool:
    return isinstance(found, list) and all(
        isinstance(row, list) and all(type(value) is kind for value in row) for row in found
    )


def token_rows(config: PretrainedConfig, special: Sequence[int], longest: int) -> list[list[int]]:
    """A few sequences of ordinary tokens, the same for the same model.

    Args:
        config: the model's.
        special: tokens to leave out, which may stand for images or end a chat.
        longest: tokens that a sequence may have.
    """
    draw = random.Random(0)
    size, left_out = config.get_text_config().vocab_size, set(special)
    rows = []
    for length in _ROW_LENGTHS:
        row: list[int] = []
        while len(row) < max(min(length, longest), 2):
            token = draw.randrange(size)
            if token not in left_out or len(left_out) >= size:
                row.append(token)
        rows.append(row)
    return rows


@torch.no_grad()
def plain_log_probs(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probs of each row alone, by a model of transformers."""
    device = next(model.parameters()).device
    values = []
    for row in rows:
        ids = torch.tensor([list(row)], device=device)
        log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        values.append(log_probs.gather(1, ids[0, 1:, None]).squeeze(1).tolist())
    return values


def _distance(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference over all tokens."""
    differences = [abs(a - b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    return math.fsum(differences) / len(differences)


def compare(model: nn.Module, trained: LogProbs, written: torch.dtype = torch.float32) -> str:
    """Compare a loaded model with the trained one.

    What rounding explains is measured: how far the model is from itself in the coarser of both dtypes.

    Args:
        model: of transformers, in float32; its weights are rounded on the way.
        trained: log-probs of the trained model.
        written: the dtype that the weights were written in.

    Returns:
        What was found, for the reader.

    Raises:
        SavedModelError: it is another model.
    """
    found = plain_log_probs(model, trained.rows)
    coarser = max((written, getattr(torch, trained.dtype)), key=lambda dtype: torch.finfo(dtype).eps)
    rounding = 0.0 if coarser == torch.float32 else _distance(found, plain_log_probs(model.to(coarser), trained.rows))
    difference, allowed = _distance(found, trained.values), 1e-3 + 4 * rounding
    if not difference <= allowed:  # also of NaN
        raise SavedModelError(
            f"its log-probs of {sum(map(len, found))} tokens differ from the trained model's by {difference:.3g} on "
            f"average, where rounding explains {allowed:.3g}"
        )
    return f"its log-probs are the trained model's, within {difference:.2g}"


# ------------------------------ settings of the model ------------------------------


def end_tokens(*found: int | Sequence[int] | None) -> int | list[int] | None:
    """End tokens of several places as one, each once, in their order."""
    lists = [[each] if isinstance(each, int) else list(each or []) for each in found]
    tokens = list(dict.fromkeys(token for each in lists for token in each))
    return tokens[0] if len(tokens) == 1 else tokens or None


def savable(generation: GenerationConfig, where: str) -> GenerationConfig:
    """Generation settings that transformers agrees to save; changes are logged.

    Temperature, top-p and the like without ``do_sample``, which transformers ignores where it generates, but refuses
    to save, are taken at their word: with ``do_sample``. What it refuses beyond that is dropped, but for the tokens.

    Args:
        generation: changed in place.
        where: names their origin.
    """
    try:
        generation.validate(strict=True)
        return generation
    except ValueError:
        generation.do_sample = True
    try:
        generation.validate(strict=True)
    except ValueError as error:
        kept = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        logger.warning(
            "%s: transformers refuses to save its generation settings (%s); only its tokens %s are saved",
            where,
            " ".join(str(error).split())[:200],
            kept,
        )
        return GenerationConfig(**kept)
    logger.warning("%s: its generation settings ask for sampling without do_sample; saved with do_sample=true", where)
    return generation


def adapter_settings(content: Mapping[str, Any], base_model: str = "") -> LoraConfig:
    """The settings of an adapter as peft's configuration, for use and not for training.

    Args:
        content: of peft's file, or of its configuration in training.
        base_model: the name or folder of the model that it belongs to.

    Raises:
        ValueError, TypeError: they are no settings of an adapter.
    """
    kept = {name: content[name] for name in _ADAPTER_SETTINGS if content.get(name) is not None}
    rank = kept.get("r")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r is {rank!r}, no rank of an adapter")
    return LoraConfig(task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=base_model, **kept)


# ------------------------------ the model ------------------------------


def _weight_names(model: Any) -> tuple[str, str] | None:
    modules = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or embeddings is None or not hasattr(output, "weight") or not hasattr(embeddings, "weight"):
        return None
    return f"{modules[id(output)]}.weight", f"{modules[id(embeddings)]}.weight"


def weight_names(config: PretrainedConfig, trusts_code: bool = False) -> tuple[str, str] | None:
    """Names of the weights of a model's output layer and embeddings; None for a model without one of them."""
    return _weight_names(_empty(config, trusts_code))


def _auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that the engine trains."""
    found = get_hf_auto_model_class(config)
    return AutoModelForCausalLM if found is AutoModel else found


def _empty(config: PretrainedConfig, trusts_code: bool) -> Any:
    with torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=trusts_code)


def _with_adapter(model: Any, state: Mapping[str, Tensor], adapter: LoraConfig, strict: bool) -> Any:
    with torch.device("meta"):
        wrapped = get_peft_model(model, adapter)
    loaded = wrapped.load_state_dict(state, strict=strict, assign=True)
    missing = [name for name in loaded.missing_keys if is_adapter(name)]
    if missing or loaded.unexpected_keys:
        raise RuntimeError(f"parameters missing: {missing[:3]}, unexpected: {loaded.unexpected_keys[:3]}")
    return wrapped


def is_adapter(name: str) -> bool:
    """Whether a parameter of a LoRA run is the adapter's."""
    return ".lora_" in name or ".modules_to_save." in name


def plain_model(
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    adapter: LoraConfig | None = None,
    dtype: torch.dtype | None = None,
    trusts_code: bool = False,
) -> Any:
    """A model of transformers with the parameters of an engine.

    Args:
        config: of the model; changed where it says that the output layer is the embeddings, and it is not.
        state: all parameters, by their names in training; not changed, but shared with the model that is made.
        adapter: of a LoRA run, whose adapter is merged, in float32.
        dtype: of the model's parameters; None leaves them as they are.
        trusts_code: the model may bring code of its own.

    Raises:
        RuntimeError: the parameters are not those of the model.
    """
    model = _empty(config, trusts_code)
    names = _weight_names(model)
    state = dict(state)
    if adapter is None and names is not None and config.get_text_config().tie_word_embeddings:
        output, embeddings = names
        if output not in state and embeddings in state:  # a shared parameter under one name
            state[output] = state[embeddings]
    if adapter is not None:
        for name, tensor in state.items():
            if tensor.is_floating_point():  # merging changes base weights in place, which may be the engine's own
                state[name] = tensor.to(torch.float32, copy=".base_layer." in name)
        model = _with_adapter(model, state, adapter, strict=True).merge_and_unload()
        state = model.state_dict()
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if names is not None and config.get_text_config().tie_word_embeddings:
        output, embeddings = names
        if not torch.equal(state[output], state[embeddings]):
            logger.warning("the output layer is not the embeddings: saved with tie_word_embeddings=false")
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    model = _empty(config, trusts_code)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def write_model(model: Any, out: Path, generation: GenerationConfig, where: str) -> None:
    """Write weights and configuration.

    Args:
        model: of ``plain_model``.
        out: the folder.
        generation: its generation settings.
        where: names the origin of these.
    """
    model.generation_config = savable(generation, where)
    model.save_pretrained(out)
    clean_configuration(out)


def clean_configuration(folder: Path) -> None:
    """Take out of a folder's config.json what only the training needs."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in _OF_TRAINING}, indent=2) + "\n")


def write_adapter(
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    adapter: LoraConfig,
    out: Path,
    dtype: torch.dtype,
    trusts_code: bool = False,
) -> None:
    """Write an adapter as a folder that peft loads.

    Args:
        config: of its base model.
        state: parameters by their names in training; others than the adapter's are left out.
        adapter: its settings.
        out: the folder.
        dtype: of the written weights.
        trusts_code: the base model may bring code of its own.

    Raises:
        RuntimeError: the parameters are not those of the adapter.
    """
    own = {name: tensor.to(dtype) for name, tensor in state.items() if is_adapter(name)}
    base_model = adapter.base_model_name_or_path
    wrapped = _with_adapter(_empty(config, trusts_code), own, adapter, strict=False)
    wrapped.peft_config["default"].base_model_name_or_path = base_model  # peft takes the name of the one in memory
    wrapped.save_pretrained(str(out), save_embedding_layers=False)


def as_loaded(model: Any) -> Any:
    """A model of ``plain_model`` as if it had been written and loaded, in float32, with what no file holds."""
    return type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=torch.float32, attn_implementation=_ATTENTION
    )


def load_written(folder: Path, trusts_code: bool = False) -> Any:
    """The model in a folder as transformers load it, in float32."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code)
    return _auto_class(config).from_pretrained(
        folder, dtype=torch.float32, attn_implementation=_ATTENTION, trust_remote_code=trusts_code
    )


def check_written(folder: Path, trained: LogProbs, written: torch.dtype, trusts_code: bool = False) -> str:
    """Load what a folder holds by plain transformers and compare it with the trained model, on the CPU.

    Costs the weights in float32 in memory.

    Raises:
        SavedModelError: it is another model.
    """
    return compare(load_written(folder, trusts_code), trained, written)


def check_adapter(folder: Path, base: Any, trained: LogProbs, written: torch.dtype) -> str:
    """As ``check_written`` of an adapter, upon its base model in float32.

    Raises:
        SavedModelError: both together are another model.
    """
    return compare(PeftModel.from_pretrained(base, str(folder)), trained, written)
