"""Estimates memory of a GPU, hours and disk of a run from the models' config.json, and what would make it fit.

    hpd-verl plan STUDENT TEACHER --gpus 8 --memory 80 --tokens 16384

Exits with 1 if the run does not fit. Method and accuracy: docs/planner.md.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from hpd_verl.checks.architecture import check_architecture
from hpd_verl.engine.families import divides_heads
from hpd_verl.engine.on_meta import CannotBuild
from hpd_verl.errors import Refused, one_line
from hpd_verl.several_teachers import STUDENT
from hpd_verl.tools.plan.memory import Memory, complaints, plan_memory, what_helps
from hpd_verl.tools.plan.model_size import ModelSize, model_size, read_config
from hpd_verl.tools.plan.run import GIB, PlannedRun
from hpd_verl.tools.plan.work import Work, plan_work

CHOICES = {
    "trainer": ("main_ppo", "lean"),
    "attention": ("flash_attention_2", "sdpa"),
    "teacher_dtype": ("bf16", "fp32"),
    "teacher_cache": ("off", "memory", "disk"),
    "teacher_cache_format": ("hidden", "topk", "hybrid"),
    "teacher_cache_dtype": ("bf16", "float32"),
    "platform": ("gpu", "cpu"),
}
HELP = {
    "gpus": "GPUs of all machines",
    "memory": "GiB of a GPU",
    "ulysses": "GPUs that share a sequence: ulysses_sequence_parallel_size",
    "tokens": "tokens per micro-batch on a GPU: ppo_max_token_len_per_gpu, or data.max_token_len_per_gpu",
    "rows": "rows of the data set",
    "prompt_tokens": "average per row",
    "response_tokens": "average per row",
    "batch_size": "rows of a step: data.train_batch_size",
    "teacher_served": "servers on other GPUs run the teacher (algorithm.hpd.teacher_server.urls)",
    "offload_policy": "FSDP2 keeps student and optimiser in the machine's memory",
    "optimizer_offload": "with param_offload: both leave the GPU while the rollout server runs",
    "store_is_full": "the teacher's store was filled ahead; the teacher is not loaded",
    "utilization": "share of peak_tflops that training reaches, recomputation included",
    "rollout_utilization": "the same of generation",
    "peak_tflops": "peak of a GPU in dense bfloat16; 989 is an H100 SXM",
    "platform": "cpu: as VERL_PLATFORM=cpu runs",
}


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, PlannedRun]:
    """The command line.

    Raises:
        ValueError: a number is outside its range.
    """
    parser = argparse.ArgumentParser(
        prog="hpd-verl plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", help="folder with config.json, or hub name")
    parser.add_argument(
        "teacher",
        nargs="*",
        help="the same, or student; several: algorithm.hpd.teachers; none: supervised fine-tuning is planned",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    types = get_type_hints(PlannedRun)
    for field in dataclasses.fields(PlannedRun):
        kind: Any = types[field.name]
        options: dict[str, Any] = {"help": HELP.get(field.name, ""), "default": field.default}
        if kind is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
            continue
        kind = next(iter(get_args(kind)), kind)
        options["help"] = f"{options['help']} ({field.default})".strip()
        parser.add_argument(f"--{field.name}", type=kind, choices=CHOICES.get(field.name), **options)
    parsed = parser.parse_args(arguments)
    run = PlannedRun(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(PlannedRun)})
    _check(run)
    return parsed, run


def _check(run: PlannedRun) -> None:
    may_be_zero = {"prompt_tokens", "lora_rank", "on_policy_fraction"}
    shares = {"on_policy_fraction", "gpu_memory_utilization", "utilization", "rollout_utilization"}
    for name, value in dataclasses.asdict(run).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not (value > 0 or (value == 0 and name in may_be_zero)) or value == float("inf"):
            raise ValueError(f"--{name}={value}: give a number above 0")
        if name in shares and value > 1:
            raise ValueError(f"--{name}={value}: give a share, at most 1")
    if not 2 <= run.teacher_cache_bits <= 7:
        raise ValueError(f"--teacher_cache_bits={run.teacher_cache_bits}: give a number from 2 to 7")
    if run.gpus % run.ulysses:
        raise ValueError(f"--ulysses={run.ulysses}: must divide --gpus={run.gpus}")
    if run.tokens * run.ulysses < run.row_tokens:
        raise ValueError(
            f"--tokens={run.tokens}: a row has {run.row_tokens} on average; a micro-batch holds whole rows"
            + (f", on {run.ulysses} GPUs" if run.ulysses > 1 else "")
        )
    if run.ulysses > 1 and run.attention == "sdpa":
        raise ValueError("--attention=sdpa: Ulysses shares out flash attention and packed_attention; leave it out")
    if run.trainer == "lean" and run.serves_rollouts:
        raise ValueError("--trainer=lean: it has no rollouts; use main_ppo, or --on_policy_fraction 0")
    if run.store_is_full and run.teacher_cache == "off":
        raise ValueError("--store_is_full: there is no store; add --teacher_cache disk")
    if run.store_is_full and run.serves_rollouts:
        raise ValueError("--store_is_full: rollouts need the teacher itself; leave it out")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _model_line(role: str, model: ModelSize) -> str:
    active = "" if model.active == model.parameters else f", {model.active:,} of them active"
    return f"{role} {model.name}: {model.parameters:,} parameters{active}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def describe(
    student: ModelSize,
    teacher: ModelSize | None,
    run: PlannedRun,
    memory: Memory,
    work: Work,
    why: list[str],
    others: Sequence[ModelSize] = (),
) -> list[str]:
    """The plan for a reader, line by line."""
    teachers = [*([] if teacher is None else [teacher]), *others]
    lines = [_model_line("student", student), *(_model_line("teacher", each) for each in teachers)]
    parts = list(dict.fromkeys(part for phase in memory.phases.values() for part in phase))
    cells = [(f"GiB on each of {run.gpus} GPUs, by phase", *memory.phases)]
    for part in parts:
        shown = [phase.get(part) for phase in memory.phases.values()]
        cells.append((part, *("" if value is None else f"{value / GIB:.2f}" for value in shown)))
    cells.append(("together", *(f"{sum(phase.values()) / GIB:.2f}" for phase in memory.phases.values())))
    lines += ["", *_table(cells)]
    for name, value in memory.machine.items():
        lines.append(f"in the machines' memory: {name} {value / GIB:.1f} GiB")
    if memory.cache_tokens is not None:
        lines.append(f"the rollout server's cache holds {memory.cache_tokens:,} tokens")
    work_rows = [("", "10^18 operations", "time")]
    for name, count in work.operations.items():
        work_rows.append((name, f"{count / 1e18:,.2f}", _hours(work.hours[name])))
    work_rows.append(("together", f"{sum(work.operations.values()) / 1e18:,.2f}", _hours(sum(work.hours.values()))))
    lines += ["", f"{work.steps:,} steps, {work.tokens / 1e9:,.3f} billion tokens:", *_table(work_rows)]
    lines.append(
        f"at {run.utilization:g} of {run.peak_tflops:g} TFLOP/s a GPU"
        + (f", rollouts at {run.rollout_utilization:g}" if run.serves_rollouts else "")
    )
    if work.store_bytes:
        lines.append(f"the teacher's store takes {work.store_bytes / GIB:,.1f} GiB")
    lines.append("")
    if not why:
        lines.append(f"fits: at most {memory.peak / GIB:.1f} of {run.memory:g} GiB, in phase '{memory.peak_phase}'")
        return lines
    lines.append(f"does not fit: {'; '.join(why)}")
    for name, saved in what_helps(student, teacher, run):
        enough = " (fits)" if memory.peak - saved <= run.memory * GIB else ""
        lines.append(f"  {name}: {saved / GIB:.1f} GiB less{enough}")
    return lines


def as_json(
    student: ModelSize,
    teacher: ModelSize | None,
    run: PlannedRun,
    memory: Memory,
    work: Work,
    why: list[str],
    others: Sequence[ModelSize] = (),
) -> dict[str, Any]:
    """The plan for a program; memory in bytes."""
    return {
        "fits": not why,
        "why": why,
        "peak_bytes": round(memory.peak),
        "peak_phase": memory.peak_phase,
        "phases": {name: {part: round(value) for part, value in each.items()} for name, each in memory.phases.items()},
        "machine_bytes": {name: round(value) for name, value in memory.machine.items()},
        "what_helps": {name: round(saved) for name, saved in what_helps(student, teacher, run)} if why else {},
        "steps": work.steps,
        "operations": work.operations,
        "hours": work.hours,
        "store_bytes": work.store_bytes,
        "student": dataclasses.asdict(student),
        "teacher": None if teacher is None else dataclasses.asdict(teacher),
        "other_teachers": [dataclasses.asdict(each) for each in others],
        "run": dataclasses.asdict(run),
    }


def _size(argument: str, name: str, run: PlannedRun) -> ModelSize:
    """Sizes of a model that the trainers take.

    Raises:
        ValueError: they would refuse it by its configuration.
    """
    checkpointed = argument == "STUDENT" and run.gradient_checkpointing
    try:
        config = read_config(name)
        check_architecture(
            argument,
            name,
            config,
            one_pass=run.trainer == "lean",
            gradient_checkpointing="--gradient_checkpointing" if checkpointed else None,
        )
        size = model_size(name, config)
        if not divides_heads(run.ulysses, size.heads, size.key_heads):
            raise Refused(
                f"--ulysses={run.ulysses}: {argument} has {size.heads} heads, {size.key_heads} of keys, which it must "
                "divide"
            )
        return size
    except CannotBuild as error:
        raise ValueError(f"{argument}={name}: transformers cannot build it: {one_line(error)[:160]}") from error
    except Refused:
        raise
    except ValueError as error:  # which begins with the name
        raise ValueError(f"{argument}={error}") from error


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    try:
        parsed, run = parse(arguments)
        student = _size("STUDENT", parsed.student, run)
        paths = [parsed.student if each == STUDENT else each for each in parsed.teacher]
        teachers = [_size("TEACHER", each, run) for each in paths]
    except ValueError as error:
        sys.exit(f"Error: {error}")
    teachers.sort(key=lambda each: -each.parameters)
    teacher, others = (teachers[0] if teachers else None), teachers[1:]
    memory, work = plan_memory(student, teacher, run, others), plan_work(student, teacher, run)
    why = complaints(memory, run)
    if parsed.json:
        print(json.dumps(as_json(student, teacher, run, memory, work, why, others), indent=2))
    else:
        print(*describe(student, teacher, run, memory, work, why, others), sep="\n")
    sys.exit(1 if why else 0)


if __name__ == "__main__":
    main()
