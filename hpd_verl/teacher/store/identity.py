"""What a store holds: the features of which teacher, in which form, of rows tokenised how."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StoreIdentity:
    """Everything that a record depends on beside the row's tokens. Made by ``teacher_identity``."""

    teacher: str
    """sha256 of the teacher's weights, adapters and own code."""

    temperature: float
    """Temperature of ``log_sum_exp`` and of all log-probs."""

    vocabulary_size: int
    """Logits that the log-probs are normalised over: the first so many of the teacher's."""

    format: str
    """hidden, topk or hybrid."""

    dtype: str
    """Of ``hidden``: bf16 or float32. Of a value of format hybrid: e8_4 with 4 bits."""

    top_k: int
    """K of formats topk and hybrid; 0 for format hidden."""

    teacher_config: str | None = None
    """sha256 of the teacher's configuration as loaded, overrides applied."""

    teacher_dtype: str | None = None
    """Dtype that the teacher computes in."""

    tokenisation: str | None = None
    """sha256 of what turns a row's text into tokens; see ``tokenisation_hash``."""

    def to_json(self) -> str:
        """One line; the same text for equal identities."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def bits(self) -> int:
        """Of a value of format hybrid."""
        return int(self.dtype.removeprefix("e8_"))

    @property
    def digest(self) -> str:
        """sha256 of the identity, for ``row_key``."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def teacher_identity(
    teacher: str,
    teacher_config: str,
    *,
    temperature: float,
    vocabulary_size: int,
    format: str,
    dtype: str,
    top_k: int,
    bits: int = 4,
    teacher_dtype: str | None = None,
    tokenisation: str | None = None,
) -> StoreIdentity:
    """The identity of a teacher's features; what the format has no use for is left out.

    Args:
        teacher, teacher_config: of ``teacher_files.teacher_hashes``.
        temperature: distillation temperature.
        vocabulary_size: logits that student and teacher share.
        format: hidden, topk or hybrid.
        dtype: of stored hidden states, bf16 or float32; without meaning for other formats.
        top_k: tokens kept per position; without meaning for format hidden.
        bits: of a value of the state; format hybrid only.
        teacher_dtype: dtype that the teacher computes in, where it matters to the caller.
        tokenisation: of ``tokenisation_hash``; rows are keyed by their tokens, so that other tokenisation could only
            miss, and is refused instead.
    """
    return StoreIdentity(
        teacher=teacher,
        teacher_config=teacher_config,
        temperature=float(temperature),
        vocabulary_size=vocabulary_size,
        format=format,
        dtype={"hidden": dtype, "topk": "float32", "hybrid": f"e8_{bits}"}[format],
        top_k=0 if format == "hidden" else min(top_k, vocabulary_size),
        teacher_dtype=teacher_dtype,
        tokenisation=tokenisation,
    )


def tokenisation_hash(vocabulary: Mapping[str, int], chat_template: str | None) -> str:
    """sha256 of a tokenizer's vocabulary and of the template that its chats are written with."""
    text = json.dumps([sorted(vocabulary.items()), chat_template], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
