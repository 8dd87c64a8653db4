"""Two steps of the lean trainer in this process, with verl's settings that change how the engine runs a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, make_model
from hydra import compose, initialize_config_dir
from verl.utils.activation_offload import SynchronizedGroupOffloadHandler
from verl.utils.device import auto_set_device
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from hpd_verl.hydra_config import config_dir
from hpd_verl.sft.start import ALONE, teacher_worker_config
from hpd_verl.sft.trainer import HPDSFTTrainer


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALONE.items():
            patch.setenv(name, value)
        initialize_global_process_group()
        yield
        destroy_global_process_group()


def first_steps(tiny: Tiny, folder: Path, *overrides: str) -> dict[str, Any]:
    """Metrics of the first two training steps, 8 rows each."""
    with initialize_config_dir(str(config_dir()), version_base=None):
        config = compose(
            "sft_trainer",
            overrides=[
                f"model.path={tiny.student}",
                f"teacher.model.path={tiny.teacher}",
                f"data.train_files={tiny.train}",
                "data.train_batch_size=8",
                "data.max_prompt_length=16",
                "data.max_response_length=16",
                "data.max_token_len_per_gpu=64",
                "trainer.total_training_steps=4",
                f"trainer.default_local_dir={folder}",
                *overrides,
            ],
        )
    auto_set_device(config)
    trainer = HPDSFTTrainer(config)
    found: dict[str, float] = {}
    for step, tensors in zip((1, 2), trainer.train_dataloader, strict=False):
        metrics = trainer._train_step(tensors, step)
        found |= {f"{name} {step}": metrics[name] for name in NAMES}
    return found


NAMES = ("hpd/loss", "actor/grad_norm", "hpd/reverse_kl_k1", "hpd/student_nll")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_activations_on_the_cpu(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """model.enable_activation_offload changes neither loss nor gradient, whether the output layer is sharded alone."""
    student = make_model(tmp_path / "student", seed=1, tie_word_embeddings=tied, num_hidden_layers=4)
    plain = first_steps(tiny, tmp_path, f"model.path={student}", "model.enable_gradient_checkpointing=false")
    monkeypatch.setattr(SynchronizedGroupOffloadHandler.offload, "__defaults__", (False,))  # no pinned memory here
    for recomputes in (False, True):
        offloaded = first_steps(
            tiny,
            tmp_path,
            f"model.path={student}",
            "model.enable_activation_offload=true",
            f"model.enable_gradient_checkpointing={recomputes}",
        )
        assert offloaded == pytest.approx(plain, rel=1e-5), recomputes


def test_a_teacher_in_float16(tiny: Tiny, tmp_path: Path) -> None:
    """Gives what one in float32 gives, up to float16's rounding; it has no gradients, which float16 would not hold."""
    half = "+teacher.engine.mixed_precision={param_dtype: fp16, reduce_dtype: fp32, buffer_dtype: fp32}"
    expected = first_steps(tiny, tmp_path)
    found = first_steps(tiny, tmp_path, half, "teacher.engine.model_dtype=fp16")
    assert found == pytest.approx(expected, rel=1e-2)
    assert found["hpd/reverse_kl_k1 1"] != expected["hpd/reverse_kl_k1 1"]


def test_a_key_of_the_teachers_engine_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the student's engine has no mixed_precision; the teacher's may be given one."""
    monkeypatch.setenv("VERL_PLATFORM", "accelerator")
    half = {"param_dtype": "fp16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    with initialize_config_dir(str(config_dir()), version_base=None):
        overrides = [f"model.path={tiny.student}", f"teacher.model.path={tiny.teacher}"]
        key = "+teacher.engine.mixed_precision={param_dtype: fp16, reduce_dtype: fp32, buffer_dtype: fp32}"
        config = compose("sft_trainer", overrides=[*overrides, key])
    assert "mixed_precision" not in config.engine
    assert teacher_worker_config(config).engine_config.mixed_precision == half
