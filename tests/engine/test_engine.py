"""verl's engine with a loss from hidden states, and the teacher on it: one rank in this process, tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, make_model, sft_config
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.workers.config import HFModelConfig, TrainingWorkerConfig

from hpd_verl.config import HPDConfig
from hpd_verl.data.response_tokens import row_numbers
from hpd_verl.engine.head_engine import HeadLoss
from hpd_verl.head.features import HiddenFeatures
from hpd_verl.head.output_head import OutputHead
from hpd_verl.pipelines.one_pass import StudentWorker
from hpd_verl.sft.demonstrations import as_batch, read_demonstrations
from hpd_verl.sft.start import teacher_settings, write_row_layouts
from hpd_verl.teacher import colocated
from hpd_verl.teacher.colocated import ColocatedTeacher

BFLOAT16 = "{param_dtype: bf16, reduce_dtype: fp32, buffer_dtype: fp32}"
PRECISIONS = {"float32": [], "bfloat16": [f"engine.mixed_precision={BFLOAT16}", "teacher.engine.model_dtype=bf16"]}


def configuration(tiny: Tiny, *overrides: str) -> DictConfig:
    config: DictConfig = sft_config(*tiny.sft, "data.train_batch_size=4", *overrides)
    write_row_layouts(config)
    return config


def make_student(config: DictConfig) -> StudentWorker:
    student = StudentWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=omega_conf_to_dataclass(config.model),
            engine_config=omega_conf_to_dataclass(config.engine),
            optimizer_config=omega_conf_to_dataclass(config.optim),
            checkpoint_config=omega_conf_to_dataclass(config.checkpoint),
        )
    )
    student.reset()
    return student


def make_batch(config: DictConfig, model: HFModelConfig) -> TensorDict:
    rows = read_demonstrations(config, model, config.data.train_files)
    collated = SFTTensorCollator("no_padding")([rows[index] for index in range(4)])
    return as_batch(config, model, collated, step=1, steps=1)


class Precision(HeadLoss):
    """Notes what a matrix product of float32 tensors is made in, inside the model and inside the loss."""

    def __init__(self) -> None:
        self.in_model: torch.dtype | None = None
        self.in_loss: torch.dtype | None = None
        self.hidden: torch.dtype | None = None

    @staticmethod
    def of_compilation(head: OutputHead) -> tuple[Any, ...]:
        """What compiled code of the output layer is made for."""
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), head.weight.dtype, len(head.weight)

    @staticmethod
    def of_a_product() -> torch.dtype:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    def from_hidden(self, hidden: Tensor, head: OutputHead, data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        self.in_loss, self.hidden = self.of_a_product(), hidden.dtype
        self.settings = self.of_compilation(head)
        return hidden.sum() * 0.0, {}


@pytest.mark.usefixtures("process_group")
def test_the_loss_is_out_of_autocast(tiny: Tiny) -> None:
    """The model's products are bfloat16; those of the loss are in the dtype of their operands."""
    config = configuration(tiny, *PRECISIONS["bfloat16"])
    student = make_student(config)
    student.engine.use_head(29)
    loss = Precision()
    student.set_loss_fn(loss)

    def note(*_: Any) -> None:
        loss.in_model = loss.of_a_product()

    handle = student.engine.module.model.norm.register_forward_hook(note)
    student.infer_batch(make_batch(config, student.model_config))
    handle.remove()
    assert loss.in_model == torch.bfloat16
    assert loss.hidden == torch.bfloat16
    assert loss.in_loss == torch.float32
    warm: list[tuple[Any, ...]] = []
    student.engine.warm_up(lambda head: warm.append(loss.of_compilation(head)))
    assert warm == [loss.settings]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("rows_each", [1, 3, 4, 5])
def test_some_rows_in_micro_batches_of_a_fixed_size(rows_each: int, tiny: Tiny) -> None:
    """As a store asks for them that has the others: features are those of the whole batch, packed by tokens."""
    config = configuration(tiny, "data.use_dynamic_bsz=false", f"data.micro_batch_size_per_gpu={rows_each}")
    worker = teacher_settings(config).worker()
    teacher = ColocatedTeacher(worker, HPDConfig(), 29)
    batch = make_batch(config, worker.model_config)
    packed = ColocatedTeacher(teacher_settings(configuration(tiny)).worker(), HPDConfig(), 29)
    assert packed.known_form() is None
    whole = packed.features(make_batch(configuration(tiny), worker.model_config))
    form = packed.known_form()
    assert form is not None
    assert all(each.tensors.keys() == form.tensors.keys() for each in whole.values())
    numbers = row_numbers(batch).tolist()
    for wanted in ([2], [0, 3], [0, 1, 2], [0, 1, 2, 3]):
        found = teacher.features(batch, wanted)
        for index in wanted:
            for name, tensor in whole[numbers[index]].tensors.items():
                torch.testing.assert_close(found[numbers[index]].tensors[name], tensor)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_teacher_head_has_memory_of_its_own(
    precision: str, tied: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weight's size, shared with no parameter; and the device's cache is released once it is made."""
    folder = make_model(tmp_path / "teacher", seed=3, tie_word_embeddings=tied)
    config = configuration(tiny, f"teacher.model.path={folder}", *PRECISIONS[precision])
    worker = teacher_settings(config).worker()
    loaded_at_release: list[bool] = []
    monkeypatch.setattr(colocated, "aggressive_empty_cache", lambda **_: loaded_at_release.append(worker.is_loaded))
    teacher = ColocatedTeacher(worker, HPDConfig(), 29)
    assert not worker.is_loaded
    teacher.prepare()
    assert loaded_at_release == [True]
    (features, *_) = teacher.features(make_batch(config, worker.model_config)).values()
    assert isinstance(features, HiddenFeatures)
    weight = features.head.weight
    assert weight.dtype == worker.engine.compute_dtype
    assert weight.untyped_storage().nbytes() == weight.nbytes
    parameters = [each.to_local() if isinstance(each, DTensor) else each for each in worker.engine.module.parameters()]
    shares = {each.untyped_storage().data_ptr() for each in parameters} & {weight.untyped_storage().data_ptr()}
    assert not shares
    before = weight.clone()
    with torch.no_grad():
        for each in parameters:
            each.zero_()
    assert torch.equal(weight, before)
    assert weight.any()
