"""Memory of one GPU in each phase of a step, by its parts.

verl's FSDP2: weights, gradients and Adam's two moments are sharded in float32; layers are gathered in the dtype of the
computation, two at a time. With gradient checkpointing a layer leaves its input, and one layer at a time its inside.
The output layer works through chunks of response tokens (hpd_verl/head). The teacher's weights lie in the machine's
memory, its layers come one by one, and each rank holds its whole output layer.

What CUDA, NCCL and the allocator's gaps take is an allowance, ``ALLOWANCE``; everything else is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hpd_verl.engine.families import divides_heads
from hpd_verl.head.hybrid_code import token_bytes
from hpd_verl.tools.plan.model_size import ModelSize
from hpd_verl.tools.plan.run import GIB, PlannedRun

ALLOWANCE = 3 * GIB
"""CUDA context, NCCL buffers, workspaces, gaps; not on a CPU."""
ASLEEP = 2 * GIB
"""Memory of a sleeping rollout server: its context and graphs."""
_CHUNK = {"gpu": 8192, "cpu": 1024}
_ELEMENTWISE = {"gpu": 2 * 4 * 2**25, "cpu": 2 * 4 * 2**18}
"""The output layer's work on a part of a chunk: head/output_head.py."""

Parts = dict[str, float]
"""Bytes by what takes them."""


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU, in bytes."""

    phases: dict[str, Parts]
    """In the order of a step."""
    machine: Parts
    """In the memory of the machines, all together."""
    cache_tokens: int | None
    """Tokens that the rollout server's cache holds on a GPU; None without a server."""

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.phases[self.peak_phase].values())


def _saved_by_layer(model: ModelSize, width: int) -> int:
    """Bytes a token that a layer keeps for its backward pass.

    Two norms keep input, normed and scaled input (in bfloat16 the first in float32); attention its inputs and output;
    the feed-forward network gate, its activation, up and their product.
    """
    norms = 6 * 4 * model.hidden if width == 4 else 16 * model.hidden
    return norms + width * (2 * model.query + 2 * model.key + 4 * model.intermediate)


def _passing(model: ModelSize, width: int) -> int:
    """Bytes a token of a layer's temporaries: gradients on the way back, or values on the way forward."""
    return width * (2 * model.hidden + 3 * model.intermediate)


def plan_memory(
    student: ModelSize, teacher: ModelSize | None, run: PlannedRun, others: Sequence[ModelSize] = ()
) -> Memory:
    """Count what one GPU holds.

    Args:
        student: its sizes.
        teacher: its sizes, of several the largest's; None without one, as objective ``sft``.
        others: the other teachers'.
        run: the settings.
    """
    on_cpu = run.platform == "cpu"
    width = 4 if on_cpu else 2  # of the computation
    tokens, responses = run.micro_batch, run.micro_batch * run.response_share
    trained = student.parameters if run.lora_rank == 0 else run.lora_rank * student.lora_per_rank
    trains_output = run.lora_rank == 0

    shard: Parts = {
        "student's weights": 4 * student.parameters / run.gpus,
        "optimiser": 8 * trained / run.gpus,
    }
    gradients = {"gradients": 4 * trained / run.gpus}
    machine: Parts = {}
    if run.offload_policy and not on_cpu:
        machine = {"student, gradients, optimiser": (4 * student.parameters + 12 * trained)}
        shard, gradients = {}, {}
    always: Parts = {} if on_cpu else {"CUDA, NCCL, gaps (allowance)": ALLOWANCE}
    if run.serves_rollouts and not on_cpu:
        always["rollout server, asleep (allowance)"] = ASLEEP

    phases: dict[str, Parts] = {}
    features = 0.0
    if teacher is not None:
        keeps_top_k = run.teacher_cache != "off" and run.teacher_cache_format == "topk"
        form_width = 8 * run.teacher_cache_top_k if keeps_top_k else width * teacher.hidden
        if run.teacher_cache != "off" and run.teacher_cache_format == "hybrid":
            form_width = token_bytes(
                teacher.hidden, teacher.vocabulary, run.teacher_cache_top_k, run.teacher_cache_bits
            )
        features = run.rows_per_gpu * run.response_tokens * (form_width + 8)
        if not (keeps_top_k and run.store_is_full):
            always["teacher's whole output layer"] = width * teacher.output
            if others:
                always["other teachers' output layers"] = width * sum(each.output for each in others)
        if not run.store_is_full:
            chunk = min(_chunk(run), responses)
            logits = width * chunk * teacher.vocabulary + _ELEMENTWISE[run.platform]
            stored = (4 if run.teacher_dtype == "fp32" else 2) * teacher.parameters
        if run.teacher_served and not run.store_is_full:
            phases["teacher"] = {**shard, **always, "logits of a chunk": logits, "teacher's features": features}
            # Prompts too, of this batch and of the one that is fetched ahead.
            machine["the teacher's hidden states"] = 2 * run.batch_size * run.row_tokens * width * teacher.hidden
        elif not run.store_is_full:
            if on_cpu:
                always["teacher's weights"] = (
                    stored / run.gpus + 4 * teacher.parameters
                )  # and gathered, which they stay
            else:
                machine["teacher's weights"] = stored
            bytes_each = 4 if run.teacher_dtype == "fp32" else 2
            weights = bytes_each * sum(each.parameters for each in others)  # between their passes too
            if others and on_cpu:
                gathered_too = 4 * sum(each.parameters for each in others)
                always["other teachers' weights"] = weights / run.gpus + gathered_too
            elif others:
                machine["other teachers' weights"] = weights
            phases["teacher"] = {
                **shard,
                **always,
                "teacher's layers, gathered": 0 if on_cpu else width * (2 * teacher.layer + teacher.output),
                "teacher's activations": tokens * (_passing(teacher, width) + 8 * teacher.hidden),
                "logits of a chunk": logits,
                "teacher's features": features,
            }

    gathered = width * (student.parameters if on_cpu else 2 * student.layer + student.output + student.embedding)
    inputs = width * tokens * student.hidden * student.layers
    inside = tokens * _saved_by_layer(student, width)
    held = inputs if run.gradient_checkpointing else inside * student.layers
    mask = 3 * tokens**2 if run.attention == "sdpa" and not on_cpu else 0
    during: Parts = {
        **shard,
        **always,
        **(gradients if run.micro_batches > 1 else {}),
        "student's layers, gathered": gathered,
        "teacher's features": features,
    }
    chunks = -(-responses // _chunk(run))
    output_gradient = 0
    if trains_output:
        several = chunks > 1 and width == 2  # added up in float32 beside one chunk's product
        output_gradient = student.output * (width + (6 if several else 0))
        output_gradient += student.output * width * len(others)  # one a teacher, added up in the backward pass
    phases["output layer"] = {
        **during,
        "activations": held + mask,
        "logits of a chunk": width * min(_chunk(run), responses) * student.vocabulary + _ELEMENTWISE[run.platform],
        "output layer's gradient": output_gradient,
        "response tokens' states": width * responses * (2 * student.hidden + (teacher.hidden if teacher else 0)),
    }
    largest = max(student.layer, student.output) if trains_output else trained / student.layers
    reduced = (width + 4) * largest
    backward = held + mask + tokens * _passing(student, width) + (inside if run.gradient_checkpointing else 0)
    phases["backward"] = {**during, "activations": backward, "gradients of a layer, whole": reduced}
    phases["optimiser"] = {
        **shard,
        **always,
        **gradients,
        "teacher's features": features,
        "optimiser's temporaries": 0 if on_cpu or run.offload_policy else 4 * trained / run.gpus,
    }
    cache_tokens = None
    if run.serves_rollouts and not on_cpu:
        server = run.gpu_memory_utilization * run.memory * GIB
        # Keys and values of the cache fill what weights and one batch's activations leave.
        free = server - 2 * student.parameters - 2 * GIB
        cache_tokens = max(0, int(free / (4 * student.key * student.layers)))
        kept = {} if run.optimizer_offload else shard
        awake = {name: value for name, value in always.items() if not name.startswith("rollout server")}
        phases["rollouts"] = {**kept, **awake, "rollout server": server}
        if run.optimizer_offload:
            machine["student and optimiser, during rollouts"] = 4 * student.parameters + 8 * trained
    return Memory(
        {name: {k: v for k, v in parts.items() if v} for name, parts in phases.items()}, machine, cache_tokens
    )


def _chunk(run: PlannedRun) -> int:
    return run.token_chunk_size or _CHUNK[run.platform]


# ------------------------------ what would help ------------------------------


def _settings(models: Sequence[ModelSize], run: PlannedRun) -> list[tuple[str, PlannedRun]]:
    """Settings that take less memory, by their names, and the run with each."""
    lean = run.trainer == "lean"
    engine = "engine" if lean else "actor_rollout_ref.actor.fsdp_config"
    model = "model" if lean else "actor_rollout_ref.model"
    length = "data.max_token_len_per_gpu" if lean else "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    tried = [
        (f"{model}.enable_gradient_checkpointing=true", replace(run, gradient_checkpointing=True)),
        (
            f"{model}.override_config.attn_implementation=flash_attention_2",
            replace(run, attention="flash_attention_2"),
        ),
        (f"algorithm.hpd.token_chunk_size={_chunk(run) // 4}", replace(run, token_chunk_size=_chunk(run) // 4)),
    ]
    fewer = run.tokens // 2
    if fewer * run.ulysses >= run.row_tokens:
        tried.append((f"{length}={fewer}", replace(run, tokens=fewer)))
    shared = 2 * run.ulysses
    divides = all(divides_heads(shared, model.heads, model.key_heads) for model in models)
    if run.gpus % shared == 0 and divides and run.attention != "sdpa":
        role = "engine" if lean else "actor_rollout_ref.actor"
        name = f"{role}.ulysses_sequence_parallel_size={shared} {length}={fewer}"
        tried.append((name, replace(run, ulysses=shared, tokens=fewer)))
    if not run.teacher_served:
        tried.append(("algorithm.hpd.teacher_server.urls, on other GPUs", replace(run, teacher_served=True)))
    if run.teacher_cache == "off" and not run.serves_rollouts:
        filled = replace(run, teacher_cache="disk", store_is_full=True)
        tried.append(("algorithm.hpd.teacher_cache=disk, filled ahead", filled))
    if run.serves_rollouts:
        tried.append(
            (f"{engine}.optimizer_offload=true {engine}.param_offload=true", replace(run, optimizer_offload=True))
        )
        lower = round(run.gpu_memory_utilization - 0.1, 2)
        if lower > 0:
            name = f"actor_rollout_ref.rollout.gpu_memory_utilization={lower:g}"
            tried.append((name, replace(run, gpu_memory_utilization=lower)))
    tried.append((f"{engine}.offload_policy=true", replace(run, offload_policy=True)))
    if run.lora_rank == 0:
        tried.append((f"{model}.lora_rank=32", replace(run, lora_rank=32)))
    tried.append((f"{2 * run.gpus} GPUs", replace(run, gpus=2 * run.gpus)))
    return tried


def what_helps(student: ModelSize, teacher: ModelSize | None, run: PlannedRun) -> list[tuple[str, float]]:
    """Settings that lower the peak by at least a hundredth, and the bytes they save, most first."""
    now = plan_memory(student, teacher, run).peak
    models = [model for model in (student, teacher) if model is not None]
    saved = [(name, now - plan_memory(student, teacher, other).peak) for name, other in _settings(models, run)]
    return sorted([each for each in saved if each[1] > 0.01 * now], key=lambda each: -each[1])


def complaints(memory: Memory, run: PlannedRun) -> list[str]:
    """Why the run does not fit; nothing if it does."""
    found = []
    for name, parts in memory.phases.items():
        total = sum(parts.values())
        if total > run.memory * GIB:
            found.append(f"phase '{name}' needs {total / GIB:.1f} of {run.memory:g} GiB")
    if memory.cache_tokens is not None and memory.cache_tokens < run.row_tokens:
        found.append(
            f"the rollout server's cache holds {memory.cache_tokens} tokens, a row has {run.row_tokens}: raise "
            "actor_rollout_ref.rollout.gpu_memory_utilization"
        )
    return found
