"""Estimated size of the teacher's store, logged before training starts."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict
from torch.utils.data import Dataset
from verl.utils.config import omega_conf_to_dataclass

from hpd_verl.config import HPDConfig
from hpd_verl.data.dataset import DEMONSTRATION, HPDDataset
from hpd_verl.data.demonstration import DemonstrationTokenizer, demonstration_of, has_demonstration
from hpd_verl.data.row import TOOLS, tools_of
from hpd_verl.teacher.model_config import teacher_model_config
from hpd_verl.teacher.store.disk import estimate_bytes
from hpd_verl.teacher.store.store import GIB, LIMIT_SETTING

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCount:
    """Rows with a demonstration, and their response tokens."""

    rows: int
    tokens: int
    source: str
    """The source of ``tokens``, for the log."""


def count_response_tokens(
    dataset: Dataset[Any], max_response_length: int, sample: int = 256, of: tuple[str, str] | None = None
) -> TokenCount:
    """Count the demonstrations' response tokens: exactly in a small data set, else from rows spread evenly over it.

    Args:
        dataset: of another class than ``HPDDataset``, each row counts ``max_response_length`` tokens.
        max_response_length: verl's ``data.max_response_length``.
        sample: rows to tokenise at most.
        of: a column and the value of the rows to count; None for all.
    """
    if not isinstance(dataset, HPDDataset):
        rows = len(dataset)  # type: ignore[arg-type]
        return TokenCount(rows, rows * max_response_length, f"at most {max_response_length:,} each")
    total = len(dataset)
    looked_at = min(sample, total)
    tokenizer = DemonstrationTokenizer(
        dataset.tokenizer, dataset.config.get("apply_chat_template_kwargs", {}), max_response_length
    )
    lengths = []
    for number in range(looked_at):
        index = number * total // looked_at
        row = dataset.row(index)
        if has_demonstration(row.get(DEMONSTRATION)) and (of is None or row.get(of[0]) == of[1]):
            answer = demonstration_of(row[DEMONSTRATION], f"row {index}")
            length = tokenizer.length(row[dataset.prompt_key], answer, tools_of(row.get(TOOLS)))
            lengths.append(min(length, max_response_length))
    if looked_at == total:
        return TokenCount(len(lengths), sum(lengths), "counted")
    rows, tokens = (round(count * total / looked_at) for count in (len(lengths), sum(lengths)))
    return TokenCount(rows, tokens, f"from the lengths of {looked_at} rows")


def describe_size(
    config: HPDConfig, hidden_size: int, vocabulary_size: int, counts: Sequence[TokenCount]
) -> tuple[str, float]:
    """What the rows need, what the limit keeps of it and, for a store on disk, what is there and free.

    Args:
        config: the algorithm's configuration, with a teacher cache.
        hidden_size, vocabulary_size: of the teacher.
        counts: of each data set.

    Returns:
        One line, and the share that is kept, from 0 to 1.
    """
    rows, tokens = (sum(getattr(count, name) for count in counts) for name in ("rows", "tokens"))
    needed = estimate_bytes(
        format=config.teacher_cache_format,
        dtype=config.teacher_cache_dtype,
        top_k=config.teacher_cache_top_k,
        bits=config.teacher_cache_bits,
        hidden_size=hidden_size,
        vocabulary_size=vocabulary_size,
        rows=rows,
        tokens=tokens,
    )
    share = min(1.0, config.teacher_cache_max_gib * GIB / needed) if needed else 1.0
    parts = [
        f"the teacher's features of {rows:,} rows with {tokens:,} response tokens "
        f"({', '.join(dict.fromkeys(count.source for count in counts))}) need {_gib(needed)}",
        f"{LIMIT_SETTING}={config.teacher_cache_max_gib:g} keeps {share:.0%} of them",
    ]
    if config.teacher_cache == "disk":
        folder = Path(str(config.teacher_cache_dir)).expanduser().absolute()
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        held = sum(file.stat().st_size for file in folder.glob("part-*"))
        parts.append(f"{folder} holds {_gib(held)}, its disk has {_gib(shutil.disk_usage(place).free)} free")
    if share < 1.0:
        smaller = " or set algorithm.hpd.teacher_cache_format=hybrid" if config.teacher_cache_format == "hidden" else ""
        parts.append(f"for the others the teacher runs in every epoch: raise the limit{smaller} to keep more")
    return "; ".join(parts), share


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / GIB:.2g} GiB"


def log_size(
    config: HPDConfig,
    student: DictConfig,
    teachers: Mapping[str, DictConfig],
    datasets: Sequence[Dataset[Any]],
    max_response_length: int,
) -> None:
    """Log ``describe_size`` of a run, as a warning if not all rows will be kept; nothing where nothing is stored.

    Args:
        config: the algorithm's configuration.
        student: its model node.
        teachers: the teachers' nodes, of ``teacher_nodes``, with what differs from the student's.
        datasets: whose demonstrations are stored.
        max_response_length: verl's ``data.max_response_length``.
    """
    for name, own in config.of_each_teacher.items():
        if own.teacher_cache == "off" or not own.needs_teacher or own.schedule.lowest == 1.0:
            continue
        node = teacher_model_config(student, teachers[name])
        with open_dict(node):
            node.load_tokenizer = False
        model = omega_conf_to_dataclass(node).hf_config.get_text_config()
        rows = (config.teacher_key, name) if name else None
        counts = [count_response_tokens(dataset, max_response_length, of=rows) for dataset in datasets]
        line, share = describe_size(own, model.hidden_size, model.vocab_size, counts)
        logger.log(logging.INFO if share == 1.0 else logging.WARNING, f"teacher {name}: {line}" if name else line)
