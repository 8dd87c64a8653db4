"""The teacher of one rank: per-token features of a batch's rows, from its model or from a store of them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.memory_utils import aggressive_empty_cache
from verl.workers.config import EngineConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.response_tokens import column, response_tokens, row_numbers
from hpd_verl.engine.causal_lm import head_scaling, output_head
from hpd_verl.engine.head_engine import MODEL_TYPE, HeadLoss
from hpd_verl.engine.ranks import on_every_rank, on_rank_zero
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, TopKFeatures, teacher_features, teacher_top_k
from hpd_verl.head.output_head import OutputHead
from hpd_verl.teacher.identity import FileHashes, teacher_hashes
from hpd_verl.teacher.store import (
    DiskStore,
    MemoryStore,
    StoreIdentity,
    TeacherStore,
    check_memory_store,
    row_key,
    teacher_identity,
    tokenisation_hash,
)

_GIB = 1 << 30


class TeacherWorker(TrainingWorker):
    """verl's worker of a reference model, with the teacher's model in place of the student's.

    Args:
        config: verl's configuration of the reference.
        model: the teacher's model.
        lazy: load the model only when ``load`` is called.
    """

    def __init__(self, config: TrainingWorkerConfig, model: HFModelConfig, lazy: bool = False) -> None:
        model_type = MODEL_TYPE if lazy else config.model_type
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


class _FeatureLoss(HeadLoss):
    """The teacher's loss function: keeps the features of each row, and has no loss."""

    def __init__(self, config: HPDConfig) -> None:
        self.config = config
        self.compiled = False
        self.head: OutputHead | None = None
        """A whole copy of the teacher's output layer, which features go with."""
        self.rows: dict[int, TeacherFeatures] = {}

    def from_hidden(self, hidden: Tensor, head: OutputHead, data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        responses = response_tokens(data)
        hidden, config = hidden[responses.positions], self.config
        if config.teacher_cache != "off" and config.teacher_cache_format == "topk":
            k = min(config.teacher_cache_top_k, head.vocabulary_size)
            features: TeacherFeatures = teacher_top_k(
                hidden, head, responses.labels, config.temperature_of_teacher, config.token_chunk_size, k=k
            )
        elif config.teacher_cache == "off" and (config.objectives.over_vocabulary or config.exact_kl_metrics):
            # The student's pass makes the product with the output layer anyway, for the whole distribution.
            assert self.head is not None
            features = HiddenFeatures(hidden.detach(), self.head, config.temperature_of_teacher)
        else:
            if config.teacher_cache != "off" and config.teacher_cache_dtype == "bf16":
                # Log-probs of the hidden states as the store keeps them: rounded alone, these would not match the rest.
                hidden = hidden.to(torch.bfloat16).to(hidden.dtype)
            assert self.head is not None
            complete = teacher_features(
                hidden, head, responses.labels, config.temperature_of_teacher, config.token_chunk_size, self.compiled
            )
            features = dataclasses.replace(complete, head=self.head)
        start = 0
        for row, length in zip(row_numbers(data).tolist(), responses.lengths.tolist(), strict=True):
            self.rows[row] = features[start : start + length]
            start += length
        return torch.zeros((), device=hidden.device), {}


class Teacher:
    """Features of rows, from the store where they are there, else from the model; all ranks together.

    Args:
        worker: the teacher's model, lazy.
        config: the algorithm's configuration.
        vocabulary_size: the teacher's logits that are used: those that the student has too.
        tokenizer: the student's, which rows are tokenised with.
    """

    def __init__(
        self, worker: TeacherWorker, config: HPDConfig, vocabulary_size: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.worker = worker
        self.config = config
        self.tokenizer = tokenizer
        self.vocabulary_size = vocabulary_size
        self.loss = _FeatureLoss(config)
        self.store = self._open_store()
        self.head: OutputHead | None = self._stored_head()
        if self.head is None:
            self._load()

    def _open_store(self) -> TeacherStore | None:
        kind, max_bytes = self.config.teacher_cache, int(self.config.teacher_cache_max_gib * _GIB)
        if kind == "off":
            return None
        if kind == "memory":
            check_memory_store(kind, torch.distributed.get_world_size())
            return MemoryStore(self._identity("", ""), max_bytes)  # of this process, which has one teacher
        assert self.config.teacher_cache_dir is not None  # HPDConfig requires it
        folder = Path(self.config.teacher_cache_dir).expanduser()
        hashes = FileHashes(folder / "teacher_files.json")
        # Of rank 0: its copy of the weights is what verl loads, and other nodes need not read theirs.
        identity = self._identity(*on_rank_zero(lambda: teacher_hashes(self.worker.model_config, hashes)))
        store = on_every_rank(lambda: DiskStore(folder, identity, max_bytes))
        hashes.save()  # once the folder is known to be this teacher's
        return store

    def _identity(self, teacher: str, teacher_config: str) -> StoreIdentity:
        return teacher_identity(
            teacher,
            teacher_config,
            temperature=self.config.temperature_of_teacher,
            vocabulary_size=self.vocabulary_size,
            format=self.config.teacher_cache_format,
            dtype=self.config.teacher_cache_dtype,
            top_k=self.config.teacher_cache_top_k,
            teacher_dtype=_dtype_name(self.worker.engine_config),
            tokenisation=tokenisation_hash(self.tokenizer.get_vocab(), self.tokenizer.chat_template),
        )

    def _stored_head(self) -> OutputHead | None:
        """The output layer as the store keeps it, with which the model need not be loaded; the same on all ranks."""
        stored = self.store.load_output_head() if isinstance(self.store, DiskStore) else None
        if _any_rank(stored is None):
            return None
        assert stored is not None
        weight, bias = stored
        scale, soft_cap = head_scaling(self.worker.model_config.hf_config)
        device = get_device_id()
        return OutputHead(
            weight=weight.to(device),
            bias=None if bias is None else bias.to(device),
            scale=scale,
            soft_cap=soft_cap,
            vocabulary_size=self.vocabulary_size,
        )

    def _load(self) -> None:
        """Load the model and take a whole copy of its output layer; the same on all ranks."""
        self.worker.load()
        engine = self.worker.engine
        engine.offer_head(self.vocabulary_size)
        self.loss.compiled = engine.compiles
        self.worker.set_loss_fn(self.loss)
        layer = output_head(engine.module, self.vocabulary_size)
        dtype = engine.compute_dtype
        self.head = dataclasses.replace(
            layer,
            weight=_whole_copy(layer.weight, dtype),
            bias=None if layer.bias is None else _whole_copy(layer.bias, dtype),
        )
        self.loss.head = self.head
        if isinstance(self.store, DiskStore):
            self.store.check_output_head(self.head.weight, self.head.bias)
            if torch.distributed.get_rank() == 0:
                self.store.save_output_head(self.head.weight, self.head.bias)
            torch.distributed.barrier()
        # What loading took on the way goes back to the device: a rollout server counts what is free there.
        aggressive_empty_cache(force_sync=True)

    def features(self, data: TensorDict) -> dict[int, TeacherFeatures]:
        """Features of the response tokens of each row.

        Args:
            data: the rows of this rank, with ``batch.SEQUENCE_FIELDS`` and ``batch.IS_ROLLOUT``, and the settings
                that verl's passes read.

        Returns:
            Row number to features, on the device.
        """
        numbers = row_numbers(data).tolist()
        found: dict[int, TeacherFeatures] = {}
        keys: dict[int, bytes] = {}
        if self.store is not None:
            keys = self._keys(data, numbers)
            stored = self.store.get(list(keys.values()))
            found = {
                row: self._with_record(record) for row, record in zip(keys, stored, strict=True) if record is not None
            }
        missing = [index for index, row in enumerate(numbers) if row not in found]
        count = _most_of_ranks(len(missing))
        if count == 0:
            return found
        if not self.worker.is_loaded:
            self._load()
        # Ranks run the model together: one with fewer missing rows computes some that it has.
        others = [index for index, row in enumerate(numbers) if row in found]
        self.worker.infer_batch(_select(data, (missing + others)[:count]))
        computed, self.loss.rows = self.loss.rows, {}
        for row, features in computed.items():
            if row in found:
                continue
            if self.store is not None and row in keys:
                # Rounded as the store keeps it, so that results do not depend on what is stored already.
                record = _record(features, self.config)
                self.store.put(keys[row], record)
                features = self._with_record(record)
            found[row] = features
        return found

    def _with_record(self, record: dict[str, Tensor]) -> TeacherFeatures:
        """Features of what the store keeps of a row, on the device."""
        assert self.head is not None
        tensors = {name: _to_device(value) for name, value in record.items()}
        if self.config.teacher_cache_format == "topk":
            return TopKFeatures(**tensors, teacher_vocabulary_size=self.vocabulary_size, dtype=self.head.dtype)
        return HiddenFeatures(**tensors, head=self.head, temperature=self.config.temperature_of_teacher)

    def metrics(self) -> dict[str, float]:
        """Of the store, since the run began: the share of rows found, rows and size; nothing without a store."""
        if self.store is None:
            return {}
        stats = self.store.stats
        return {
            "hpd/teacher_cache_hit_fraction": stats.hits / max(1, stats.hits + stats.misses),
            "hpd/teacher_cache_rows": stats.rows,
            "hpd/teacher_cache_gib": stats.bytes / _GIB,
            "hpd/teacher_cache_refused_rows": stats.refused,
            "hpd/teacher_cache_non_finite_rows": stats.non_finite,
            "hpd/teacher_cache_damaged_rows": stats.damaged,
            "hpd/teacher_is_loaded": float(self.worker.is_loaded),
        }

    def _keys(self, data: TensorDict, numbers: list[int]) -> dict[int, bytes]:
        """Store keys of the demonstrations among the rows; a rollout is never seen again."""
        assert self.store is not None
        identity = self.store.identity.digest
        rollouts = column(data, fields.IS_ROLLOUT).tolist()
        return {
            row: row_key(identity, ids, len(response))
            for row, ids, response, is_rollout in zip(
                numbers, data["input_ids"].unbind(), data["responses"].unbind(), rollouts, strict=True
            )
            if not is_rollout
        }


def _dtype_name(engine: EngineConfig) -> str:
    """What the teacher's weights are kept and used in."""
    return f"{engine.model_dtype}, {(engine.mixed_precision or {}).get('param_dtype', 'bf16')}"


def _whole_copy(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter on the device, gathered, in memory of its own and no more: FSDP frees and moves the parameter's."""
    whole = parameter.detach().to(get_device_id())
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    copy = whole.to(dtype)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    storage = copy.untyped_storage()
    is_own = storage.data_ptr() != local.untyped_storage().data_ptr() and storage.nbytes() == copy.nbytes
    return copy if is_own else copy.clone()


def _most_of_ranks(count: int) -> int:
    value = torch.tensor(count, device=get_device_id())
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value.item())


def _any_rank(condition: bool) -> bool:
    return _most_of_ranks(int(condition)) > 0


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


def _to_device(value: Tensor) -> Tensor:
    """A stored tensor on the device; from pinned memory the copy does not hold up the process."""
    device = get_device_name()
    return value if device == "cpu" else value.pin_memory().to(device, non_blocking=True)


def _record(features: TeacherFeatures, config: HPDConfig) -> dict[str, Tensor]:
    """What the store keeps of a row's features."""
    dtypes = {
        "hidden": torch.bfloat16 if config.teacher_cache_dtype == "bf16" else torch.float32,
        "top_tokens": torch.int32,
    }
    return {name: value.detach().to("cpu", dtypes.get(name, torch.float32)) for name, value in features.tensors.items()}
