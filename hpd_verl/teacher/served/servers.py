"""The servers that the settings name, and what they are asked."""

import torch
from verl.workers.config import HFModelConfig

from hpd_verl.config import HPDConfig
from hpd_verl.teacher.served.client import HiddenStates, Question, Servers, TopLogProbs
from hpd_verl.teacher.served.probe import probe_tokens


def make_servers(model: HFModelConfig, dtype: torch.dtype, config: HPDConfig, vocabulary_size: int) -> Servers:
    """The servers of a teacher, not asked yet.

    Args:
        model: the teacher.
        dtype: of its products.
        config: the algorithm's configuration.
        vocabulary_size: the teacher's logits that are used.

    Raises:
        ValueError: an API key that no header can hold.
    """
    hidden_size = model.hf_config.get_text_config().hidden_size
    dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    special = list(getattr(model.tokenizer, "all_special_ids", []))
    tokens = probe_tokens(model.hf_config, special, vocabulary_size)
    asked: dict[str, Question] = {
        "hidden": HiddenStates(hidden_size, dtype),
        "topk": TopLogProbs(config.teacher_server.top_k),
    }
    chosen = config.teacher_server.features
    questions = list(asked.values()) if chosen == "auto" else [asked[chosen]]
    return Servers(config.teacher_server, questions, tokens, dtype)
