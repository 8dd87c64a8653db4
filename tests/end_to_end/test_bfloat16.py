"""Training as on GPUs, by settings that a CPU's defaults leave out: bfloat16, resharding and gradient checkpointing."""

import math

import pytest
from test_sft_trainer import RunSFT, run_sft  # noqa: F401 - a fixture

AS_ON_GPUS = (
    "engine.reshard_after_forward=true",
    "model.enable_gradient_checkpointing=true",
    "data.use_dynamic_bsz=false",
    "data.micro_batch_size_per_gpu=1",  # 4 of them a step, on each of 2 ranks
    "algorithm.hpd.objective=hpd_exact",  # rounding changes some draws
    "optim.lr=1e-4",
    "trainer.resume_mode=disable",
)
PRECISION = "{param_dtype: bf16, reduce_dtype: fp32, buffer_dtype: fp32}"
BFLOAT16 = (
    f"engine.mixed_precision={PRECISION}",
    "teacher.engine.model_dtype=bf16",
)


def test_bfloat16_is_close_to_float32(run_sft: RunSFT) -> None:  # noqa: F811
    """Finite losses and gradients, near those of float32."""
    exact, rounded = (run_sft(*AS_ON_GPUS, *precision, ranks=2) for precision in ((), BFLOAT16))
    for run in (exact, rounded):
        assert run.returncode == 0, run.output[-3000:]
        assert len(run.steps) == 4
    assert rounded.losses() != exact.losses()
    for name in ("hpd/loss", "hpd/student_nll", "hpd/teacher_nll", "actor/grad_norm"):
        values = [step[name] for step in rounded.steps]
        assert all(map(math.isfinite, values)), name
        # Of a random model rounding turns the gradient a good deal; a mistake of scale would turn it more.
        tolerance = 0.3 if name == "actor/grad_norm" else 0.03
        assert values == pytest.approx([step[name] for step in exact.steps], rel=tolerance, abs=0.05), name
