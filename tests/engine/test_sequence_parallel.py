"""One pass with Ulysses: ranks that share sequences out have one rank's loss, metrics and gradients."""

import os
import socket
import traceback
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from conftest import WORDS, Tiny, make_tokenizer
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.metric import Metric
from verl.workers.config import TrainingWorkerConfig

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.hydra_config import config_dir
from hpd_verl.pipelines.one_pass import OnePass, StudentWorker
from hpd_verl.sft.demonstrations import as_batch, read_demonstrations
from hpd_verl.sft.start import teacher_settings, write_row_layouts
from hpd_verl.teacher.choice import make_teacher

SHARED_OUT = {1: [1], 2: [2], 4: [4, 2]}
"""Ranks, to how many share a sequence."""


@dataclass(frozen=True)
class Case:
    """A batch and the settings of its update, of algorithm.hpd."""

    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 8
    """Of the global batch."""
    aggregation: str = "token-mean"
    times: int = 1
    """The last of which counts."""


PLACED = """
from hpd_verl.objectives import objective

@objective("placed", over="vocabulary", returns="loss", needs={"step", "position", "row.is_rollout"})
def placed(log_probs, context):
    weight = context.position / context.length + context.step / context.steps - context.row["is_rollout"]
    return weight * (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1)
"""
STORE = {"teacher_cache": "disk", "teacher_cache_max_gib": 0.01, "teacher_cache_dtype": "float32"}
BOTH = {"objective": {"hpd_exact": 1.0, "hpd": 0.5}}
CASES = {
    "tokens": Case(),
    "vocabulary": Case({**BOTH, "exact_kl_metrics": True}, aggregation="seq-mean-token-mean"),
    "stored, fewer rows than ranks": Case({**BOTH, **STORE}, rows=2, times=2),
    "top-k stored": Case({**STORE, "teacher_cache_format": "topk"}),
    "no teacher": Case({"objective": "sft"}, aggregation="seq-mean-token-sum"),
    "a loss with a context": Case({"objective": "placed.py:placed"}),
}


def make_models(folder: Path) -> None:
    """Student and teacher with 4 heads, of which 2 share a key."""
    for seed, (name, layers) in enumerate((("student", 2), ("teacher", 3))):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(WORDS)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = AutoConfig.for_model(
            "llama",
            vocab_size=len(tokenizer),
            num_hidden_layers=layers,
            initializer_range=0.3,
            max_position_embeddings=64,
            **sizes,
            **ends,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def configuration(folder: Path, rows: Path, shared: int) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base=None):
        config = compose(
            "sft_trainer",
            [
                f"model.path={folder / 'student'}",
                f"teacher.model.path={folder / 'teacher'}",
                f"data.train_files={rows}",
                "data.train_batch_size=8",
                "data.max_prompt_length=16",
                "data.max_response_length=16",
                f"data.max_token_len_per_gpu={64 // shared}",
                "engine.dtype=float32",
                "teacher.engine.model_dtype=fp32",
                "+teacher.engine.dtype=float32",
                f"engine.ulysses_sequence_parallel_size={shared}",
            ],
        )
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


class Updates:
    """Of one rank: a student and a teacher, and what an update of each case gives; the updates change nothing."""

    def __init__(self, folder: Path, rows: Path, shared: int) -> None:
        self.config = configuration(folder, rows, shared)
        self.store = folder / f"{torch.distributed.get_world_size()}_{shared}"
        self.student = make_student(self.config)
        self.teacher = teacher_settings(self.config)
        self.demonstrations = read_demonstrations(self.config, self.student.model_config, str(rows))
        self.gradients: dict[str, Any] = {}
        engine = self.student.engine
        step = engine.optimizer_step

        def note_gradients() -> Any:
            for name, parameter in engine.module.named_parameters():
                gradient = parameter.grad
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                self.gradients[name] = whole.clone().numpy()
            return step()

        engine.optimizer_step = note_gradients
        for group in engine.optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0

    def batch(self, rows: int) -> TensorDict:
        """This data-parallel rank's."""
        engine = self.student.engine
        own = range(engine.get_data_parallel_rank(), rows, engine.get_data_parallel_size())
        collated = SFTTensorCollator("no_padding")([self.demonstrations[index] for index in own])
        data = as_batch(self.config, self.student.model_config, collated, step=3, steps=7)
        tu.assign_non_tensor(data, global_batch_size=rows)
        return data

    def of(self, name: str) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of the update, and of a validation in which a row does not count; and the gradients."""
        case = CASES[name]
        own = {**case.settings, "teacher_cache_dir": str(self.store / name.split(",")[0])}
        hpd = HPDConfig.from_config(OmegaConf.merge(self.config.algorithm.hpd, own))
        teacher = make_teacher(self.teacher, hpd, self.student.model_config) if hpd.needs_teacher else None
        one_pass = OnePass(self.student, teacher, hpd, case.aggregation)
        for _ in range(case.times):
            data = self.batch(case.rows)
            mini_batches = {"mini_batch_size": case.rows, "epochs": 1, "dataloader_kwargs": {"shuffle": False}}
            tu.assign_non_tensor(data, **mini_batches)
            output = one_pass.update(data)
        validated = self.batch(case.rows)
        is_padding = validated[fields.ROW].values() == 1
        validated[fields.IS_PADDING] = tu.nested_tensor_from_tensor_list(list(is_padding.long().unsqueeze(1)))
        of_validation = one_pass.evaluate(validated)
        found: dict[str, float] = {}
        if output is not None and of_validation is not None:
            found = {metric: float(np.mean(value)) for metric, value in tu.get(output, "metrics").items()}
            for metric, value in tu.get(of_validation, "metrics").items():
                if isinstance(value, list) and isinstance(value[0], Metric):
                    found[f"val/{metric}"] = float(Metric.aggregate_dp(value))
        kept = {metric: value for metric, value in found.items() if "hpd/" in metric or metric in ("loss", "grad_norm")}
        return kept, dict(self.gradients)


def run_cases(rank: int, ranks: int, port: int, folder: Path, rows: Path, results: Any) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.distributed.init_process_group("gloo")
    os.chdir(folder)  # of the objective's file
    try:
        for shared in SHARED_OUT[ranks]:
            updates = Updates(folder, rows, shared)
            for name in CASES:
                results.put((ranks, shared, rank, name, updates.of(name)))
    except BaseException:
        results.put((ranks, 0, rank, "", traceback.format_exc()))
        raise
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(
    tiny: Tiny, processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int, int, str], Any]:
    """Metrics and gradients by ranks, how many share a sequence, rank and case."""
    folder = tmp_path_factory.mktemp("shared_out")
    make_models(folder)
    (folder / "placed.py").write_text(PLACED)
    results = processes.Queue()
    workers = []
    for ranks in SHARED_OUT:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            arguments = (rank, ranks, port, folder, tiny.train, results)
            workers.append(processes.Process(target=run_cases, args=arguments))
            workers[-1].start()
    found = {}
    for _ in range(len(CASES) * sum(ranks * len(shared) for ranks, shared in SHARED_OUT.items())):
        ranks, shared, rank, name, outcome = results.get(timeout=180)
        assert shared, outcome
        found[ranks, shared, rank, name] = outcome
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("ranks", "shared"), [(2, 2), (4, 4), (4, 2)])
def test_as_one_rank(ranks: int, shared: int, name: str, outcomes: dict[Any, Any]) -> None:
    expected, gradients = outcomes[1, 1, 0, name]
    assert expected["hpd/response_tokens"] > 0
    found, _ = outcomes[ranks, shared, 0, name]
    assert found.keys() == expected.keys()
    worst = 0.0
    for metric, value in expected.items():
        if "teacher_cache" not in metric:
            assert found[metric] == pytest.approx(value, rel=1e-6, abs=1e-6), metric
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6 * max(1.0, expected["loss"]))
    largest = max(abs(each).max() for each in gradients.values())
    assert largest > 0.01
    for rank in range(ranks):
        for parameter, gradient in outcomes[ranks, shared, rank, name][1].items():
            worst = max(worst, abs(gradient - gradients[parameter]).max())
    off = abs(found["loss"] - expected["loss"])
    print(f"{name}, {ranks} ranks, {shared} share: loss {off:.1e}, gradients {worst:.1e} of {largest:.2g}")
    assert worst < 1e-5
