"""What the teacher's store keeps of a row: one record, its key and its bytes.

A record holds the features of one row's T response tokens, in one of three formats:

    hidden   label_log_probs float32 [T], log_sum_exp float32 [T], hidden bfloat16 or float32 [T, d]
    topk     label_log_probs float32 [T], rest_log_prob float32 [T], top_tokens int32 [T, K],
             top_log_probs float32 [T, K]
    hybrid   label_log_probs float32 [T], shift float32 [T], packed uint8 [T, bytes], of ``head.hybrid_code``

``hidden`` is the final hidden state, before the output head; ``log_sum_exp`` that of the teacher's logits over the
temperature. The names are those of the features in ``head.features``.
"""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpd_verl.teacher.store.identity import StoreIdentity

Record = dict[str, Tensor]
"""The named tensors of one row, on the CPU."""

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
"""Of stored hidden states, by the names of the setting."""


def output_head_hash(weight: Tensor, bias: Tensor | None = None) -> str:
    """sha256 of an output head: names, dtypes, shapes and all bytes.

    Args:
        weight: [V, d].
        bias: [V], where the head has one.
    """
    digest = hashlib.sha256()
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def row_key(identity: bytes | str, input_ids: Tensor, response_length: int) -> bytes:
    """The key of a row's record.

    Args:
        identity: of the features, ``StoreIdentity.digest``.
        input_ids: integer [prompt + response], the row's tokens without padding.
        response_length: how many of them, at the end, are the response.

    Returns:
        32 bytes.
    """
    assert input_ids.dim() == 1, "the tokens of one row"
    assert 0 <= response_length <= input_ids.numel(), "the response is the end of the row"
    identity = identity.encode() if isinstance(identity, str) else identity
    digest = hashlib.sha256(struct.pack("<QQQ", len(identity), input_ids.numel(), response_length))
    digest.update(identity)
    digest.update(input_ids.cpu().numpy().astype("<i8").tobytes())
    return digest.digest()


# Records as bytes


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values' bytes; a view of a contiguous CPU tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Field:
    dtype: torch.dtype
    wide: bool
    """Shape [T, width] instead of [T]."""


class Schema:
    """Names, dtypes and shapes of a store's records, and their bytes one after another."""

    def __init__(self, identity: StoreIdentity) -> None:
        # Items of two bytes come last, so that all values are aligned.
        self.fields = {"label_log_probs": _Field(torch.float32, wide=False)}
        if identity.format == "hidden":
            self.fields["log_sum_exp"] = _Field(torch.float32, wide=False)
            self.fields["hidden"] = _Field(DTYPES[identity.dtype], wide=True)
        elif identity.format == "hybrid":
            self.fields["shift"] = _Field(torch.float32, wide=False)
            self.fields["packed"] = _Field(torch.uint8, wide=True)
        else:
            self.fields["rest_log_prob"] = _Field(torch.float32, wide=False)
            self.fields["top_tokens"] = _Field(torch.int32, wide=True)
            self.fields["top_log_probs"] = _Field(torch.float32, wide=True)
        self.fixed_width = identity.top_k if identity.format == "topk" else None

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """By the tensors' names."""
        return {name: field.dtype for name, field in self.fields.items()}

    def check(self, record: Record) -> tuple[int, int]:
        """The record's tokens T and width (d, K or bytes).

        Raises:
            ValueError: a tensor is missing, unknown, or of another dtype or shape.
        """
        if record.keys() != self.fields.keys():
            raise ValueError(f"a record has the tensors {', '.join(self.fields)}, not {', '.join(record)}")
        tokens = record["label_log_probs"].numel()
        width = next(record[name].shape[-1:].numel() for name, field in self.fields.items() if field.wide)
        if self.fixed_width is not None:
            width = self.fixed_width
        for name, field in self.fields.items():
            tensor, shape = record[name], (tokens, width) if field.wide else (tokens,)
            if tensor.dtype != field.dtype or tensor.shape != shape:
                raise ValueError(
                    f"{name} of a record must be {field.dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}"
                )
        return tokens, width

    def size(self, tokens: int, width: int) -> int:
        """Bytes of a record."""
        return sum(tokens * (width if field.wide else 1) * field.dtype.itemsize for field in self.fields.values())

    def pack(self, record: Record) -> bytes:
        return b"".join(tensor_bytes(record[name]) for name in self.fields)

    def unpack(self, payload: bytearray, tokens: int, width: int) -> Record:
        """Tensors that share the memory of ``payload``."""
        storage = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8)).untyped_storage()
        record, offset = {}, 0
        for name, field in self.fields.items():
            shape, stride = ((tokens, width), (width, 1)) if field.wide else ((tokens,), (1,))
            start = offset // field.dtype.itemsize
            record[name] = torch.empty(0, dtype=field.dtype).set_(storage, start, shape, stride)
            offset += record[name].nbytes
        return record
