"""Whether a model can be trained, or teach, by its configuration alone. For the trainers and the planner."""

from transformers import PretrainedConfig, PreTrainedModel

from hpd_verl.engine import on_meta
from hpd_verl.engine.causal_lm import check_one_pass
from hpd_verl.errors import Refused, require


def check_architecture(
    setting: str,
    path: str,
    config: PretrainedConfig,
    *,
    one_pass: bool = True,
    gradient_checkpointing: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Check by a model's configuration whether it can be trained, or teach.

    Args:
        setting, path: its path, for errors.
        config: its configuration.
        one_pass: the loss takes the place of its output layer.
        gradient_checkpointing: name of the setting where it is on.
        trust_remote_code: whether code in its folder may run.

    Returns:
        The model on the meta device.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
        on_meta.CannotBuild: transformers does not build it.
    """
    quantised = on_meta.quantisation(config)
    require(
        quantised is None,
        setting,
        path,
        f"its weights are quantised ({quantised}); give unquantised weights",
    )
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise Refused(f"{setting}={path}: its configuration has no vocab_size; choose a language model")
    model = on_meta.build(config, trust_remote_code)
    if model.get_output_embeddings() is None:
        raise Refused(
            f"{setting}={path}: {type(model).__name__} has no output layer over the vocabulary; choose a causal "
            "language model"
        )
    if one_pass:
        check_one_pass(model)
    if gradient_checkpointing is not None and not model.supports_gradient_checkpointing:
        raise Refused(f"{gradient_checkpointing}=True: {type(model).__name__} does not support it; set it to false")
    return model
