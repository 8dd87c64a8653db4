"""The teacher's model beside the student, in verl's engine."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.memory_utils import aggressive_empty_cache
from verl.workers.config import EngineConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.response_tokens import response_tokens, row_numbers
from hpd_verl.engine.causal_lm import output_head
from hpd_verl.engine.head_engine import MODEL_TYPE, HeadLoss
from hpd_verl.engine.ranks import highest_of_ranks
from hpd_verl.engine.row_engine import ROWS_MODEL_TYPE
from hpd_verl.engine.sequence_parallel import SequenceGroup
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, TopKFeatures, teacher_features, teacher_top_k
from hpd_verl.head.hybrid import HybridFeatures, teacher_hybrid
from hpd_verl.head.hybrid_code import HybridCode
from hpd_verl.head.output_head import OutputHead
from hpd_verl.teacher.store.records import DTYPES
from hpd_verl.teacher.teacher import Teacher


class TeacherWorker(TrainingWorker):
    """verl's worker of a reference model, with the teacher's model in place of the student's.

    Args:
        config: verl's configuration of the reference.
        model: the teacher's model.
        lazy: load the model only when ``load`` is called.
    """

    def __init__(self, config: TrainingWorkerConfig, model: HFModelConfig, lazy: bool = False) -> None:
        model_type = MODEL_TYPE if lazy else ROWS_MODEL_TYPE
        super().__init__(dataclasses.replace(config, model_config=model, model_type=model_type))
        self.lazy = lazy
        self.is_loaded = False

    def reset(self) -> None:
        """verl's call to load the model."""
        if not self.lazy:
            self.load()

    def load(self) -> None:
        """Load the model, once. All ranks together."""
        if not self.is_loaded:
            super().reset()
            self.is_loaded = True


@dataclasses.dataclass(frozen=True)
class FeatureForm:
    """The form of the teacher's features."""

    top_k: int | None = None
    """The log-probs of so many tokens; None: hidden states."""
    bits: int | None = None
    """Format hybrid: of a value of the coarse hidden state; with ``top_k`` tokens' corrections."""
    rounded_to: torch.dtype | None = None
    """Hidden states are rounded before anything is computed from them, so that log-probs fit what a store keeps."""
    complete: bool = True
    """With the label's log-prob and the log-sum-exp of the logits, which take a product with the output layer."""

    @classmethod
    def of(cls, config: HPDConfig) -> "FeatureForm":
        """The form that the objectives need or the store keeps."""
        if config.teacher_cache == "off":
            # For the whole distribution, the student's pass makes the product with the output layer anyway.
            return cls(complete=not (config.objectives.over_vocabulary or config.exact_kl_metrics))
        if config.teacher_cache_format == "topk":
            return cls(top_k=config.teacher_cache_top_k)
        if config.teacher_cache_format == "hybrid":
            return cls(top_k=config.teacher_cache_top_k, bits=config.teacher_cache_bits)
        return cls(rounded_to=DTYPES[config.teacher_cache_dtype])


class FeatureMaker:
    """Makes features of hidden states.

    Args:
        form: which features.
        head: the teacher's output layer, whole.
        temperature: of the teacher's distribution.
        chunk_size: tokens whose logits exist at once; None chooses by the device.
        compiled: fuse the elementwise work by ``torch.compile``.
    """

    def __init__(
        self, form: FeatureForm, head: OutputHead, temperature: float, chunk_size: int | None, compiled: bool
    ) -> None:
        self.form = form
        self.head = head
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.compiled = compiled
        self.code: HybridCode | None = None
        if form.top_k is not None and form.bits is not None:
            self.code = HybridCode(head, temperature, form.top_k, form.bits)

    def features(self, hidden: Tensor, head: OutputHead, labels: Tensor) -> TeacherFeatures:
        """Features of hidden states; ``head`` is that of the pass, whose logits are this one's."""
        if self.code is not None:
            return teacher_hybrid(hidden, self.code, labels, self.chunk_size)
        if self.form.top_k is not None:
            k = min(self.form.top_k, head.vocabulary_size)
            return teacher_top_k(hidden, head, labels, self.temperature, self.chunk_size, k=k)
        if not self.form.complete:
            return HiddenFeatures(hidden.detach(), self.head, self.temperature)
        if self.form.rounded_to is not None:
            hidden = hidden.to(self.form.rounded_to).to(hidden.dtype)
        features = teacher_features(hidden, head, labels, self.temperature, self.chunk_size, self.compiled)
        return dataclasses.replace(features, head=self.head)  # of this pass, the engine's own is sharded again

    def known_form(self) -> TeacherFeatures:
        """Features of no tokens."""
        head, nothing = self.head, self.head.weight.new_empty(0)
        if self.code is not None:
            return HybridFeatures(nothing, nothing, nothing, self.code)
        if self.form.top_k is not None:
            return TopKFeatures(nothing, nothing, nothing, nothing, head.vocabulary_size, head.dtype)
        known = nothing if self.form.complete else None
        return HiddenFeatures(nothing, head, self.temperature, known, known)


class _FeatureLoss(FeatureMaker, HeadLoss):
    """The teacher's loss function: keeps the features of each row, and has no loss."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows: dict[int, TeacherFeatures] = {}
        self.owners: dict[int, int] = {}
        """The rank of a group that wants a row, by row number."""

    def from_hidden(self, hidden: Tensor, head: OutputHead, data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        sharing, rows = SequenceGroup.current(), row_numbers(data).tolist()
        parts = sharing.parts(response_tokens(data), len(hidden))
        responses = parts[sharing.rank]
        features = self.features(responses.take(hidden), head, responses.labels)
        if sharing.size > 1:
            owned = sharing.to_owners(features, parts, [self.owners.get(row) for row in rows])
            self.rows |= {rows[index]: of_row for index, of_row in owned.items()}
        else:
            start = 0
            for row, length in zip(rows, responses.lengths.tolist(), strict=True):
                self.rows[row] = features[start : start + length]
                start += length
        return torch.zeros((), device=hidden.device), {}


class ColocatedTeacher(Teacher):
    """Features from the teacher's model, loaded when they are first needed.

    Args:
        worker: the teacher's model, lazy.
        config: the algorithm's configuration.
        vocabulary_size: the teacher's logits that are used: those that the student has too.
    """

    def __init__(self, worker: TrainingWorker, config: HPDConfig, vocabulary_size: int) -> None:
        self.worker = worker
        self.config = config
        self.vocabulary_size = vocabulary_size
        self._loss: _FeatureLoss | None = None

    def prepare(self) -> None:
        """Load the model and take a whole copy of its output layer.

        Raises:
            ValueError: the output layer is not understood.
        """
        self._loaded()

    def _loaded(self) -> _FeatureLoss:
        if self._loss is not None:
            return self._loss
        self._load()
        engine = self.worker.engine
        engine.use_head(self.vocabulary_size)
        head = self._whole_head()
        form, temperature = FeatureForm.of(self.config), self.config.temperature_of_teacher
        self._loss = _FeatureLoss(form, head, temperature, self.config.token_chunk_size, engine.compiles)
        # Return memory that loading took: a rollout server counts the free memory of the device.
        aggressive_empty_cache(force_sync=True)
        return self._loss

    def _load(self) -> None:
        """Load the model, once; all ranks together."""
        assert isinstance(self.worker, TeacherWorker)
        self.worker.load()

    def _whole_head(self) -> OutputHead:
        """A copy of the output layer, gathered; all ranks together."""
        engine = self.worker.engine
        layer, dtype = output_head(engine.module, self.vocabulary_size), engine.compute_dtype
        return dataclasses.replace(
            layer,
            weight=_full_copy(layer.weight, dtype),
            bias=None if layer.bias is None else _full_copy(layer.bias, dtype),
        )

    def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
        sharing = SequenceGroup.of(self.worker.engine.ulysses_parallel_group)
        of_ranks = sharing.gather(list(range(len(data))) if wanted is None else list(wanted))
        rows = [row for of_rank in of_ranks for row in of_rank]
        count = highest_of_ranks(len(rows))
        if count == 0:
            return {}
        # Ranks run the model together, and micro-batches of a fixed size are whole: some rows are computed that nobody
        # needs, or twice.
        others = [index for index in range(len(data)) if index not in set(rows)]
        loss, numbers = self._loaded(), row_numbers(data).tolist()
        loss.owners = {numbers[row]: rank for rank, of_rank in enumerate(of_ranks) for row in of_rank}
        self.worker.set_loss_fn(loss)
        size = _whole_micro_batches(count, self.worker.engine_config)
        order = rows + others
        self.worker.infer_batch(_select(data, [order[index % len(order)] for index in range(size)]))
        computed, loss.rows = loss.rows, {}
        return computed

    def known_form(self) -> TeacherFeatures | None:
        return None if self._loss is None else self._loss.known_form()

    def metrics(self) -> dict[str, float]:
        return {}


def _whole_micro_batches(rows: int, engine: EngineConfig) -> int:
    """Rows of the teacher's pass in which so many are wanted; verl's micro-batches of a fixed size must be full."""
    if engine.use_dynamic_bsz:
        return rows
    size = engine.infer_micro_batch_size_per_gpu
    return math.ceil(rows / size) * size


def _full_copy(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A gathered copy of a parameter on the device, because FSDP frees and moves the parameter's memory."""
    full = parameter.detach().to(get_device_id())
    if isinstance(full, DTensor):
        full = full.full_tensor()
    copy = full.to(dtype)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    storage = copy.untyped_storage()
    is_own = storage.data_ptr() != local.untyped_storage().data_ptr() and storage.nbytes() == copy.nbytes
    return copy if is_own else copy.clone()


_PASS_SETTINGS = ("temperature", fields.STEP, "pad_token_id")


def _select(data: TensorDict, rows: list[int]) -> TensorDict:
    """Some rows of a batch, with what the teacher's pass reads."""
    named = [name for name in fields.SEQUENCE_FIELDS if name in data]
    selected = tu.index_select_tensor_dict(data.select(*named), rows)
    for name in _PASS_SETTINGS:
        value = tu.get_non_tensor_data(data=data, key=name, default=None)
        if value is not None:
            tu.assign_non_tensor(selected, **{name: value})
    return selected
