"""A batch as several updates: the same on any ranks and for any micro-batches, with metrics over all tokens."""

import os
import queue
import socket
from itertools import chain, pairwise
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, sft_config
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group
from verl.workers.config import ActorConfig, TrainingWorkerConfig

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.pipelines.choice import PIPELINES
from hpd_verl.pipelines.one_pass import OnePass, StudentWorker
from hpd_verl.pipelines.updates import batch_metrics, rows_of_ranks
from hpd_verl.sft.demonstrations import as_batch, read_demonstrations
from hpd_verl.sft.start import ALONE, teacher_settings
from hpd_verl.teacher.choice import make_teacher

ROOT = Path(__file__).resolve().parents[2]
ROWS, MINI = 8, 4
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def student_server_log_probs(row: dict[str, Any]) -> torch.Tensor:
    """What a rollout server might say of a row's response: numbers that differ from token to token."""
    return -0.1 * (row["responses"].float() + 1)


def take(
    tiny: Tiny, pipeline: str, *overrides: str, mini: int = MINI, epochs: int = 1, mode: str = "token-mean"
) -> Any:
    """Train a new student on this rank's rows of one batch, every third of which is a rollout; returns the metrics."""
    settings = [
        *tiny.sft,
        f"data.train_batch_size={ROWS}",
        "optim.lr=1e-2",
        "optim.lr_scheduler_type=constant",
        "optim.lr_warmup_steps_ratio=0",
        "optim.total_training_steps=100",
        *overrides,
    ]
    config = sft_config(*settings)
    model, optimizer = omega_conf_to_dataclass(config.model), omega_conf_to_dataclass(config.optim)
    student = (StudentWorker if pipeline == "one_pass" else PIPELINES["staged"].student_worker)(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=omega_conf_to_dataclass(config.engine),
            optimizer_config=optimizer,
            checkpoint_config=omega_conf_to_dataclass(config.checkpoint),
        )
    )
    student.reset()
    dataset = read_demonstrations(config, model, config.data.train_files)
    rows = [dataset[index] for index in range(ROWS)]
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    of_rank = rows_of_ranks([len(row["input_ids"]) for row in rows], ROWS // mini, ranks)[rank]
    for index in of_rank:
        rows[index][fields.IS_ROLLOUT] = torch.tensor([int(index % 3 == 0)])
        rows[index][fields.ROLLOUT_LOG_PROBS] = student_server_log_probs(rows[index])
    data = as_batch(config, model, SFTTensorCollator("no_padding")([rows[index] for index in of_rank]), step=1, steps=1)
    tu.assign_non_tensor(
        data, mini_batch_size=mini, global_batch_size=mini, epochs=epochs, dataloader_kwargs={"shuffle": False}
    )
    hpd, teacher = HPDConfig.from_config(config.algorithm.hpd), teacher_settings(config)
    if pipeline == "one_pass":
        output = OnePass(student, make_teacher(teacher, hpd, model), hpd, mode, 16).update(data)
    else:
        from step import RankBatch

        worker = teacher.worker()
        worker.load()
        actor = ActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            optim=optimizer,
            loss_agg_mode=mode,
            loss_scale_factor=16,
            clip_ratio_low=1e-3,
            clip_ratio_high=1e-3,
        )
        staged, driver = PIPELINES["staged"], PIPELINES["staged"].driver(hpd, ROWS // mini * epochs)
        of_workers = staged.rank.of_workers(student, worker, hpd, actor)
        tu.assign_non_tensor(data, **driver.settings)
        batch = RankBatch(data, student, worker)
        driver.student_pass(batch)
        driver.teacher_pass(batch)
        driver.weigh(batch)
        output = of_workers.update(batch.data)
    found = tu.get(output, "metrics")
    return {name: value for name, value in found.items() if name.startswith(("hpd/", "actor/", "loss", "grad_norm"))}


FIXED = ("data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1", "model.use_remove_padding=false")
SPLITS: dict[str, dict[str, Any]] = {
    "one pass": {"pipeline": "one_pass"},
    "one pass, rows": {"pipeline": "one_pass", "overrides": FIXED},
    # Where torch's compiler is switched off, as here, the compiled passes run uncompiled, warm-up and all.
    "one pass, compiled": {"pipeline": "one_pass", "overrides": ("engine.use_torch_compile=true",)},
    "one pass, of sequences, two epochs": {"pipeline": "one_pass", "mode": "seq-mean-token-sum-norm", "epochs": 2},
    "staged": {"pipeline": "staged", "epochs": 2},
    "staged, rows": {"pipeline": "staged", "epochs": 2, "overrides": FIXED},
}


def run_rank(tiny: Tiny, rank: int, ranks: int, port: int, results: Any) -> None:
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    os.environ.update(
        {**ALONE, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
    )
    initialize_global_process_group()
    found = {}
    for name, split in SPLITS.items():
        settings = dict(split)
        found[name] = take(tiny, settings.pop("pipeline"), *settings.pop("overrides", ()), **settings)
    if ranks == 1:
        for mode in MODES:
            for mini in (MINI, ROWS):
                found[f"{mode} {mini}"] = take(tiny, "one_pass", "optim.lr=0", mini=mini, mode=mode)
    results.put((ranks, rank, found))
    torch.distributed.barrier()
    destroy_global_process_group()


@pytest.fixture(scope="module")
def found(tiny: Tiny, processes: ForkServerContext) -> dict[int, dict[str, dict[str, Any]]]:
    """Metrics on 1 and on 2 ranks, of the first rank."""
    results = processes.Queue()
    workers = []
    for ranks in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            workers.append(processes.Process(target=run_rank, args=(tiny, rank, ranks, port, results)))
            workers[-1].start()
    outcomes: list[Any] = []
    while len(outcomes) < len(workers):
        try:
            outcomes.append(results.get(timeout=1))
        except queue.Empty:
            assert not any(worker.exitcode for worker in workers), "a rank failed"
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    return {ranks: metrics for ranks, rank, metrics in outcomes if rank == 0}


@pytest.mark.parametrize("name", SPLITS)
def test_updates_do_not_depend_on_ranks(found: dict[int, dict[str, dict[str, Any]]], name: str) -> None:
    one, two = found[1][name], found[2][name]
    assert one.keys() == two.keys()
    assert len(one["grad_norm"]) == 2 * SPLITS[name].get("epochs", 1)
    for metric, value in one.items():  # Adam's steps carry on the rounding of those before them
        assert two[metric] == pytest.approx(value, rel=2e-3, abs=1e-6), metric


@pytest.mark.parametrize("pipeline", ["one pass", "staged"])
def test_updates_do_not_depend_on_micro_batches(found: dict[int, dict[str, dict[str, Any]]], pipeline: str) -> None:
    packed, rows = found[1][pipeline], found[2][f"{pipeline}, rows"]
    for metric, value in packed.items():
        assert rows[metric] == pytest.approx(value, rel=2e-4, abs=1e-6), metric
    if pipeline == "staged":
        assert 0 < packed["actor/pg_clipfrac"] < 1


@pytest.mark.parametrize("mode", MODES)
def test_metrics_are_those_of_the_batch(found: dict[int, dict[str, dict[str, Any]]], mode: str) -> None:
    """With a student that does not move, two updates log what one does."""
    two, one = found[1][f"{mode} {MINI}"], found[1][f"{mode} {ROWS}"]
    assert len(two.pop("grad_norm")) == 2
    assert len(one.pop("grad_norm")) == 1
    # Of the first update alone: later ones have another student.
    assert two.pop("hpd/rollout_log_prob_difference") != one.pop("hpd/rollout_log_prob_difference")
    assert two == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_the_rollout_servers_difference(found: dict[int, dict[str, dict[str, Any]]], tiny: Tiny) -> None:
    """Mean over the rollouts' tokens of the first update, by transformers."""
    from transformers import AutoModelForCausalLM

    config = sft_config(*tiny.sft)
    dataset = read_demonstrations(config, omega_conf_to_dataclass(config.model), config.data.train_files)
    model = AutoModelForCausalLM.from_pretrained(tiny.student)
    differences = []
    for index in (0, 3):
        row = dataset[index]
        with torch.no_grad():
            log_probs = model(row["input_ids"].unsqueeze(0)).logits[0].log_softmax(-1)
        labels, prompt = row["responses"], len(row["prompts"])
        own = log_probs[prompt - 1 : -1].gather(1, labels.unsqueeze(1)).squeeze(1)
        differences.append((student_server_log_probs(row) - own).abs())
    assert found[2]["one pass, rows"]["hpd/rollout_log_prob_difference"] == pytest.approx(
        torch.cat(differences).mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_update_has_its_part_of_the_batch(ranks: int) -> None:
    """Whatever their lengths, with as much work on each rank as can be."""
    lengths = [9, 1, 30, 4, 2, 2, 25, 8, 3, 90, 5, 7, 1, 1, 12, 60]
    parts = rows_of_ranks(lengths, updates=2, ranks=ranks)
    share = 8 // ranks
    for update in range(2):
        taken = [part[update * share : (update + 1) * share] for part in parts]
        assert all(len(each) == share for each in taken)
        assert sorted(chain.from_iterable(taken)) == list(range(8 * update, 8 * update + 8))
    assert all(len(part) == 2 * share for part in parts)
    if ranks == 2:  # the longest row of an update is not beside its next longest
        for rows in parts:
            assert not {9, 15} <= set(rows)
    if ranks == 1:
        assert parts == [list(range(16))]
    assert all(first < second for part in parts for first, second in pairwise(part))


def test_means_are_over_the_tokens_of_all_updates() -> None:
    """Two epochs of two updates with 10 and 30 tokens."""
    metrics = {
        "hpd/response_tokens": [10.0, 30.0, 10.0, 30.0],
        "hpd/student_nll": [1.0, 2.0, 3.0, 4.0],
        "hpd/loss": [1.0, 2.0, 3.0, 4.0],
        "loss": [1.0, 2.0, 3.0, 4.0],
        "grad_norm": [1.0, 2.0, 3.0, 4.0],
        "lr": [0.5],
        "hpd/rollout_log_prob_difference": [6.0, 1.0, 1.0, 1.0],
        "rollout_tokens": [3.0, 0.0, 3.0, 0.0],
    }
    found = batch_metrics(metrics, 2, "token-mean")
    assert found == {
        "hpd/response_tokens": 40,
        "hpd/student_nll": (10 * 1 + 30 * 2 + 10 * 3 + 30 * 4) / 80,
        "hpd/loss": 2.75,
        "loss": 2.75,
        "grad_norm": [1.0, 2.0, 3.0, 4.0],
        "lr": [0.5],
        "hpd/rollout_log_prob_difference": 2,
    }
    assert batch_metrics(metrics, 2, "token-sum")["loss"] == 5  # of the batch, in an epoch
    assert batch_metrics(metrics, 2, "seq-mean-token-mean")["loss"] == 2.5
    none = batch_metrics(metrics | {"rollout_tokens": [0.0, 3.0, 0.0, 3.0]}, 2, "token-mean")
    assert "hpd/rollout_log_prob_difference" not in none, "the first update has no rollout"
