"""Which model answers: the hidden states of a fixed token sequence, compared with those of before."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PretrainedConfig

from hpd_verl.engine.saved_model import token_rows

FILE = "teacher_probe.safetensors"
"""Name of a probe's file, in a store's folder and in a checkpoint's."""

_LONGEST = 16
_FAR = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
"""Mean of 1 - cosine over the tokens above which another model answers. Kernels and batches move float32 by 1e-12 and
bfloat16 by some 1e-4; 8-bit weights move them by 1e-3 to 5e-3, other weights by 1."""
_FAR_LOG_PROBS = 1e-4
"""The same of log-probs, of which there is one a token: bfloat16 moves them by some 1e-5."""


@dataclass(frozen=True)
class Probe:
    """Hidden states of a model at a few tokens."""

    tokens: list[int]
    hidden: Tensor
    """float32 [tokens, d], on the CPU; of a server that gives log-probs alone, those of the tokens, [1, tokens - 1]."""

    def difference(self, other: Tensor, dtype: torch.dtype) -> str | None:
        """How the answer of a server differs; None where the same model gave it.

        Args:
            other: [tokens, d].
            dtype: of the teacher's products.
        """
        if not other.isfinite().all():
            return "NaN or infinity in its hidden states"
        if other.shape != self.hidden.shape:
            return f"hidden states of {tuple(other.shape)} for {tuple(self.hidden.shape)}"
        mine, its = self.hidden.double(), other.double()
        far = 1 - torch.nn.functional.cosine_similarity(mine, its, dim=-1).mean().item()
        longer = abs(its.norm().item() / max(mine.norm().item(), 1e-30) - 1)
        limit = _FAR_LOG_PROBS if len(self.hidden) == 1 else _FAR.get(dtype, _FAR[torch.bfloat16])
        if far > limit or longer > limit**0.5:
            return f"hidden states of a fixed sequence have cosine {1 - far:.6f} and {1 + longer:.4f} times the norm"
        return None

    @property
    def digest(self) -> str:
        """sha256."""
        digest = hashlib.sha256(json.dumps(self.tokens).encode())
        digest.update(self.hidden.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def write_new(self, folder: Path) -> bool:
        """Write the probe's file, unless it is there; whether it was not."""
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"{FILE}.{os.getpid()}"
        own.write_bytes(save({"hidden": self.hidden.contiguous(), "tokens": torch.tensor(self.tokens)}))
        try:
            os.link(own, folder / FILE)  # whole or not at all, and one of several writers
        except FileExistsError:
            return False
        finally:
            own.unlink()
        return True

    @classmethod
    def read(cls, folder: Path) -> "Probe | None":
        """The probe of a folder; None without one.

        Raises:
            ValueError: its file is damaged.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            found = load(file.read_bytes())
            return cls(found["tokens"].tolist(), found["hidden"].float())
        except Exception as error:  # whatever safetensors raises
            raise ValueError(f"{file} cannot be read ({error}); remove it, or take another folder") from error


def probe_tokens(config: PretrainedConfig, special: list[int], vocabulary_size: int) -> list[int]:
    """A sequence of ordinary tokens, the same for the same model.

    Args:
        config: the teacher's.
        special: tokens to leave out.
        vocabulary_size: tokens that the server knows.
    """
    (row, *_) = token_rows(config, special, _LONGEST)
    return [token % vocabulary_size for token in row]
