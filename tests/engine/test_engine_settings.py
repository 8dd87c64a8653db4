"""Two steps of the lean trainer in this process, with verl's settings that change how the engine runs a model."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, make_model, sft_config
from verl.utils.activation_offload import SynchronizedGroupOffloadHandler
from verl.utils.device import auto_set_device

from hpd_verl.sft.start import teacher_worker_config
from hpd_verl.sft.trainer import HPDSFTTrainer

pytestmark = pytest.mark.usefixtures("process_group")


def first_steps(tiny: Tiny, folder: Path, *overrides: str) -> dict[str, Any]:
    """Metrics of the first two training steps, 8 rows each."""
    settings = ["data.max_token_len_per_gpu=64", "trainer.total_training_steps=4"]
    config = sft_config(*tiny.sft, *settings, f"trainer.default_local_dir={folder}", *overrides)
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
    key = "+teacher.engine.mixed_precision={param_dtype: fp16, reduce_dtype: fp32, buffer_dtype: fp32}"
    config = sft_config(*tiny.sft, key)
    assert "mixed_precision" not in config.engine
    assert teacher_worker_config(config).engine_config.mixed_precision == half
