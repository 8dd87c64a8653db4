"""Floating-point operations and hours of a run, and the size of its store."""

from dataclasses import dataclass

from hpd_verl.teacher.store.disk import estimate_bytes
from hpd_verl.tools.plan.model_size import ModelSize
from hpd_verl.tools.plan.run import PlannedRun


@dataclass(frozen=True)
class Work:
    """Work of a whole run, over all GPUs."""

    steps: int
    tokens: float
    """Prompts and responses, every epoch."""
    operations: dict[str, float]
    """By what they are for."""
    hours: dict[str, float]
    store_bytes: int
    """0 without a store."""


def _forward(model: ModelSize, run: PlannedRun) -> float:
    """Operations of one row's forward pass, the output layer left out: two a parameter, and causal attention."""
    attention = 2 * model.query * model.layers * run.row_tokens**2
    return 2 * model.body * run.row_tokens + attention


def plan_work(student: ModelSize, teacher: ModelSize | None, run: PlannedRun) -> Work:
    """Count operations.

    Args:
        student: its sizes.
        teacher: its sizes; None without one.
        run: the settings.
    """
    rows = run.rows * run.epochs
    # Backward is twice forward, but for frozen weights once; checkpointing is forward again.
    passes = (3 if run.lora_rank == 0 else 2) + (1 if run.gradient_checkpointing else 0)
    output_passes = 3 if run.lora_rank == 0 else 2
    operations = {
        "student": rows * passes * _forward(student, run),
        "student's output layer": rows * output_passes * 2 * student.output * run.response_tokens,
    }
    if teacher is not None:
        taught = rows
        if run.teacher_cache != "off":  # demonstrations once, rollouts every time
            once = 0.0 if run.store_is_full else min(rows, run.rows)
            taught = rows * run.on_policy_fraction + once * (1 - run.on_policy_fraction)
        forward = 0.0 if run.teacher_served else _forward(teacher, run)  # on the servers' GPUs
        operations["teacher"] = taught * (forward + 2 * teacher.output * run.response_tokens)
    generated = rows * run.on_policy_fraction
    if generated:
        operations["rollouts"] = generated * (_forward(student, run) + 2 * student.output * run.response_tokens)
    speed = run.gpus * run.peak_tflops * 1e12 * 3600
    hours = {
        name: count / speed / (run.rollout_utilization if name == "rollouts" else run.utilization)
        for name, count in operations.items()
    }
    store = 0
    if teacher is not None and run.teacher_cache != "off":
        store = estimate_bytes(
            format=run.teacher_cache_format,
            dtype=run.teacher_cache_dtype,
            top_k=run.teacher_cache_top_k,
            bits=run.teacher_cache_bits,
            hidden_size=teacher.hidden,
            vocabulary_size=teacher.vocabulary,
            rows=run.rows,
            tokens=run.rows * run.response_tokens,
        )
        if run.teacher_cache_format != "topk":
            is_wide = run.teacher_cache_format == "hidden" and run.teacher_cache_dtype == "float32"
            store += (4 if is_wide else 2) * teacher.output
    return Work(round(rows / run.batch_size), rows * run.row_tokens, operations, hours, store)
