"""A teacher that runs in servers: do they answer, as this teacher, and for rows as long as the run's?"""

import importlib.util
import logging
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase
from verl.workers.config import HFModelConfig

from hpd_verl.config import HPDConfig
from hpd_verl.errors import Refused, one_line, require
from hpd_verl.teacher.served.client import TopLogProbs
from hpd_verl.teacher.served.output_layer import output_layer
from hpd_verl.teacher.served.probe import FILE
from hpd_verl.teacher.served.servers import make_servers
from hpd_verl.teacher.store.teacher_files import config_hash
from hpd_verl.teacher.teacher import TeacherUnavailable
from hpd_verl.teacher_server import NODE, URLS

logger = logging.getLogger(__name__)

BESIDE_A_STORE = 5.0
"""Seconds to wait for a server that a store may stand in for."""

_TEXT = "Let x_1 = 3.14159 + 2024;  so  f(x) = \\frac{x}{2}.\n\n    def step(self): return 'naïve café 你好'  # 100%"
"""Split differently by tokenizers that share a vocabulary but not their merges."""


def check_teacher_server(
    hpd: HPDConfig, setting: str, teacher: HFModelConfig, student: HFModelConfig, needed_context: int
) -> None:
    """Wait for the teacher's servers, and compare what they serve with the teacher's files.

    Of servers that the run is going to start: can they be? Beside a store that servers have filled, they may be absent.

    Args:
        hpd: the algorithm's settings, with servers.
        setting: of the teacher's path.
        teacher, student: their configurations.
        needed_context: data.max_prompt_length + data.max_response_length, tokens.

    Raises:
        ValueError: one line that names the setting, what was found and what to do.
    """
    if hpd.teacher_server.n_gpus_per_node:
        require(
            importlib.util.find_spec("vllm") is not None,
            f"{NODE}.n_gpus_per_node",
            hpd.teacher_server.n_gpus_per_node,
            f"vLLM is not installed, which serves the teacher; install it, or give {URLS}",
        )
        output_layer(teacher, setting, read=False)
        return
    vocabulary_size = min(student.hf_config.vocab_size, teacher.hf_config.vocab_size)
    servers = make_servers(teacher, torch.bfloat16, hpd, vocabulary_size)
    has_store = _has_store(hpd)
    if has_store:
        servers.timeout = min(servers.timeout, BESIDE_A_STORE)
    try:
        try:
            answered = servers.connect().result()
        except TeacherUnavailable as error:
            if not has_store:
                raise
            logger.info("%s; it is asked again if a row is not in %s", one_line(error), hpd.teacher_cache_dir)
            return
        for served in answered:
            longest = served.max_model_len
            # The last token of a row is never sent.
            require(
                longest is None or longest >= needed_context - 1,
                URLS,
                served.url,
                f"it takes {longest} tokens (max_model_len), and data.max_prompt_length + data.max_response_length = "
                f"{needed_context}; start it with --max-model-len {needed_context}, or shorten the rows",
            )
            _check_root(served.url, served.root, setting, teacher)
        if isinstance(servers.question, TopLogProbs):
            hpd.check_served_top_k()
            logger.info("%s gives log-probs, not hidden states: top %d", URLS, hpd.teacher_server.top_k)
        else:
            output_layer(teacher, setting, read=False)
        _check_tokens(servers.tokenise(_TEXT), hpd, student.tokenizer)
    finally:
        servers.close()


def _has_store(hpd: HPDConfig) -> bool:
    """Whether servers have filled a store that the run may find all its rows in."""
    if hpd.teacher_cache != "disk" or hpd.teacher_cache_dir is None or hpd.schedule.highest > 0:
        return False
    return (Path(hpd.teacher_cache_dir).expanduser() / FILE).is_file()


def _check_root(url: str, root: str | None, setting: str, teacher: HFModelConfig) -> None:
    """What the server has loaded, where that is a folder here."""
    if root is None or not (Path(root) / "config.json").is_file():
        logger.info("%s serves %s", url, root)
        return
    try:
        its = AutoConfig.from_pretrained(root, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises on what the file may hold
        logger.info("%s serves %s, whose configuration cannot be compared: %s", url, root, one_line(error))
        return
    if config_hash(its) != config_hash(AutoConfig.from_pretrained(teacher.local_path)):
        raise Refused(
            f"{URLS}={url}: it serves {root}, whose config.json is not that of {setting}={teacher.path}; serve the "
            f"teacher, or give its folder as {setting}"
        )


def _check_tokens(found: list[int] | None, hpd: HPDConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = tokenizer.encode(_TEXT, add_special_tokens=False)
    require(
        found is None or found == expected,
        URLS,
        hpd.teacher_server.urls[0],
        f"its tokenizer makes {len(found or [])} tokens of a text of which the student's makes {len(expected)}, or "
        "others; serve a teacher with the student's tokenizer",
    )
