"""Rows of demonstrations as token sequences, and batches of them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import Dataset
from verl.utils import tensordict_utils as tu
from verl.workers.config import HFModelConfig

from hpd_verl.data import fields
from hpd_verl.data.dataset import DEMONSTRATION, HPDDataset
from hpd_verl.data.demonstration import SequenceBuilder, demonstration_of
from hpd_verl.data.row import TOOLS, tools_of
from hpd_verl.data.teacher_prompt import TeacherPromptTokenizer, max_teacher_prompt_length


class DemonstrationDataset(Dataset[dict[str, Tensor]]):
    """Demonstrations as token sequences.

    Args:
        rows: the checked rows.
        sequences: how a row becomes tokens.
        teacher_prompts: the same as ``sequences`` of the teacher's prompts; None where the teacher reads the student's.
    """

    def __init__(
        self,
        rows: HPDDataset,
        sequences: SequenceBuilder,
        teacher_prompts: TeacherPromptTokenizer | None = None,
    ) -> None:
        self.rows = rows
        self.sequences = sequences
        self.teacher_prompts = teacher_prompts

    def __len__(self) -> int:
        return len(self.rows.dataframe)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows.row(index)
        where = f"row {index}"
        answer = demonstration_of(row.get(DEMONSTRATION), where)
        tensors, flags = self.sequences.build(row[self.rows.prompt_key], answer, where, tools_of(row.get(TOOLS)))
        if self.teacher_prompts is not None:
            chat = self.rows.teacher_prompts.messages(row)
            encoded = self.teacher_prompts.encode(chat, where, tools_of(row.get(TOOLS)))
            tensors[fields.TEACHER_PROMPTS], flags[fields.TRUNCATED_TEACHER_PROMPT] = encoded
        columns = {fields.ROW: index, fields.IS_ROLLOUT: 0, fields.TRUNCATED_TEACHER_PROMPT: 0, **flags}
        teachers = self.rows.teachers
        if teachers:
            columns[fields.TEACHER] = teachers.index(row[self.rows.teacher_key])
        numbers = {name: torch.tensor([value]) for name, value in self.rows.numbers(index).items()}
        return tensors | {name: torch.tensor([int(value)]) for name, value in columns.items()} | numbers


class PaddedRows(Dataset[dict[str, Tensor]]):
    """Rows padded to a multiple by copies with their own row numbers, marked by ``fields.IS_PADDING``.

    Args:
        rows: the rows.
        multiple: of what the length becomes a multiple.
    """

    def __init__(self, rows: DemonstrationDataset, multiple: int) -> None:
        self.rows = rows
        self.length = math.ceil(len(rows) / multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        flags = {fields.ROW: index, fields.IS_PADDING: int(index >= len(self.rows))}
        return self.rows[index % len(self.rows)] | {name: torch.tensor([value]) for name, value in flags.items()}


class LookAhead:
    """A stateful loader, of which a batch may be known early; its state is that of what was trained on.

    Args:
        loader: verl's.
        looks: whether the batch after is taken out early.
    """

    def __init__(self, loader: Any, looks: bool) -> None:
        self.loader = loader
        self.looks = looks
        self._state: dict[str, Any] | None = None
        self._after_this: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Each batch of an epoch with the one after it, None at its end; call ``trained`` after each."""
        if self._state is None:
            self._state = self.loader.state_dict()
        batches = iter(self.loader)
        batch = next(batches, None)
        while batch is not None:
            self._after_this = self.loader.state_dict()
            following = next(batches, None) if self.looks else None
            yield batch, following
            batch = following if self.looks else next(batches, None)

    def trained(self) -> None:
        """The batch that was handed out last is trained on."""
        self._state = self._after_this

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def read_demonstrations(
    config: DictConfig, model: HFModelConfig, files: Any, max_samples: int = -1
) -> DemonstrationDataset:
    """The rows of ``files`` (a path or a list of them), which the start has checked, as the student's tokens."""
    data = OmegaConf.merge(config.data, {"train_files": files})  # validation rows need demonstrations too
    OmegaConf.update(data, "files_are_checked", True, force_add=True)
    files = [files] if isinstance(files, str) else list(files)
    rows = HPDDataset(files, model.tokenizer, data, max_samples=max_samples)
    sequences = SequenceBuilder(
        model, data.apply_chat_template_kwargs, data.max_prompt_length, data.max_response_length
    )
    teacher_prompts = None
    if rows.has_teacher_prompts:
        longest = max_teacher_prompt_length(config.data)
        teacher_prompts = TeacherPromptTokenizer(sequences.prompts, longest, sequences.embedded)
    return DemonstrationDataset(rows, sequences, teacher_prompts)


def as_batch(config: DictConfig, model: HFModelConfig, tensors: Mapping[str, Any], step: int, steps: int) -> TensorDict:
    """Collated rows with the settings that verl's passes read, and the step of how many."""
    data = config.data
    settings = {
        "use_dynamic_bsz": data.use_dynamic_bsz,
        "max_token_len_per_gpu": data.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": data.micro_batch_size_per_gpu,
        "temperature": config.algorithm.hpd.temperature,
        "global_batch_size": data.train_batch_size,
        "pad_mode": data.pad_mode,
        "pad_token_id": model.tokenizer.pad_token_id,
        fields.STEP: step,
        fields.STEPS: steps,
    }
    return tu.get_tensordict(tensor_dict=dict(tensors), non_tensor_dict=settings)
