"""A whole training step inside verl's engine: supervised fine-tuning, and HPD in every pipeline.

    python benchmarks/step.py --student DIR --teacher DIR --data train.parquet

Forward, backward, clipping and AdamW of one batch, in one process without Ray, the implementations taking turns on one
student; medians are appended to benchmarks/results/step.csv with the machine and the versions.

    verl_sft            verl's own supervised loss on logits of all tokens: what ratios are to
    sft                 objective sft through HPD's output layer, which sees response tokens only
    staged              student pass, teacher pass, weights, update
    one_pass            teacher's features, then one student pass
    one_pass_bf16       the same with a bfloat16 teacher
    one_pass_stored     the same with all rows in a bfloat16 store on disk
    one_pass_topk       the same with all rows in a store of 64 log-probs a token

It runs on a GPU where torch sees one, with sdpa unless flash-attn is installed, and then notes the peak of each
implementation's allocated memory too; VERL_PLATFORM=cpu keeps it off the GPU.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
if not torch.cuda.is_available():
    os.environ.setdefault("VERL_PLATFORM", "cpu")

import verl  # noqa: E402, F401 - loads the plugin
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from results import append_rows, machine  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.utils.dataset.dataset_utils import SFTTensorCollator  # noqa: E402
from verl.utils.device import get_device_name, get_torch_device  # noqa: E402
from verl.utils.distributed import initialize_global_process_group  # noqa: E402
from verl.workers.config import ActorConfig, TrainingWorkerConfig  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
from verl.workers.utils.losses import sft_loss  # noqa: E402

from hpd_verl.config import HPDConfig  # noqa: E402
from hpd_verl.hydra_config import config_dir  # noqa: E402
from hpd_verl.pipelines.one_pass import OnePass, StudentWorker  # noqa: E402
from hpd_verl.pipelines.pipeline import Batch  # noqa: E402
from hpd_verl.pipelines.staged import STAGED  # noqa: E402
from hpd_verl.sft.demonstrations import DemonstrationDataset, as_batch, read_demonstrations  # noqa: E402
from hpd_verl.sft.start import ALONE, teacher_settings, write_row_layouts  # noqa: E402
from hpd_verl.teacher.choice import make_teacher  # noqa: E402
from hpd_verl.teacher.settings import TeacherSettings  # noqa: E402

Step = Callable[[], TensorDict | None]
"""One training step; returns what verl's worker returns, the metrics among it."""


class Steps:
    """The implementations, on one student and one batch."""

    def __init__(self, config: DictConfig, rows: int, longest: int, store: Path) -> None:
        self.config = config
        self.store = store
        self.model = omega_conf_to_dataclass(config.model)
        self.optimizer = omega_conf_to_dataclass(config.optim)
        self.optimizer.total_training_steps = 1_000_000
        self.student = StudentWorker(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=self.model,
                engine_config=omega_conf_to_dataclass(config.engine),
                optimizer_config=self.optimizer,
                checkpoint_config=omega_conf_to_dataclass(config.checkpoint),
            )
        )
        self.student.reset()
        self.teacher = teacher_settings(config)
        dataset = read_demonstrations(config, self.model, config.data.train_files)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.rows = _rows_of_length(dataset, rows, longest)[rank::ranks]  # verl shares a global batch out

    def batch(self, **settings: Any) -> TensorDict:
        collated = SFTTensorCollator("no_padding")(self.rows)
        data = as_batch(self.config, self.model, collated, step=1, steps=1)
        size = self.config.data.train_batch_size
        tu.assign_non_tensor(
            data, mini_batch_size=size, global_batch_size=size, epochs=1, dataloader_kwargs={"shuffle": False}
        )
        tu.assign_non_tensor(data, **settings)
        return data

    def verl_sft(self) -> Step:
        loss = partial(sft_loss, config=None)

        def step() -> TensorDict | None:
            self.student.set_loss_fn(loss)
            data = self.batch()
            lengths = [torch.zeros(len(row["prompts"]), dtype=torch.int64) for row in self.rows]
            masks = [torch.cat([zeros, row["loss_mask"]]) for zeros, row in zip(lengths, self.rows, strict=True)]
            data["loss_mask"] = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
            return self.student.train_mini_batch(data)

        return step

    def one_pass(self, teacher: TeacherSettings | None = None, **settings: Any) -> Step:
        hpd = HPDConfig.from_config(OmegaConf.merge(self.config.algorithm.hpd, settings))
        of_run = teacher or self.teacher
        one_pass = OnePass(self.student, make_teacher(of_run, hpd, self.model) if hpd.needs_teacher else None, hpd)

        def step() -> TensorDict | None:
            self.student.set_loss_fn(one_pass.loss)
            return one_pass.update(self.batch())

        return step

    def stored(self, form: str) -> Step:
        return self.one_pass(
            teacher_cache="disk",
            teacher_cache_dir=str(self.store / form),
            teacher_cache_format=form,
            teacher_cache_max_gib=1.0,
        )

    def bf16_teacher(self) -> Step:
        config = self.config.copy()
        precision = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        OmegaConf.update(
            config, "teacher.engine", {"model_dtype": "bf16", "mixed_precision": precision}, force_add=True
        )
        return self.one_pass(teacher_settings(config))

    def staged(self) -> Step:
        hpd = HPDConfig.from_config(self.config.algorithm.hpd)
        actor = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, optim=self.optimizer)
        driver = STAGED.driver(hpd)
        teacher = self.teacher.worker()
        teacher.load()

        def step() -> TensorDict | None:
            rank = STAGED.rank.of_workers(self.student, teacher, hpd, actor)
            batch = RankBatch(self.batch(**driver.settings), self.student, teacher)
            driver.student_pass(batch)
            driver.teacher_pass(batch)
            driver.weigh(batch)
            return rank.update(batch.data)

        return step


class RankBatch(Batch):
    """One rank's rows of demonstrations as a whole batch, without a queue between driver and models."""

    def __init__(self, data: TensorDict, student: TrainingWorker, teacher: TrainingWorker) -> None:
        self.data = data
        self.student = student
        self.teacher = teacher
        self.step = 1
        self.is_rollout = torch.zeros(len(data), dtype=torch.bool)

    def row_name(self, index: int) -> str:
        return str(index)

    def student_pass(self, inputs: Sequence[str]) -> None:
        self.data.update(self.student.infer_batch(self.data).exclude("metrics"))

    def teacher_pass(self, inputs: Sequence[str]) -> None:
        self.data.update(self.teacher.infer_batch(self.data).exclude("metrics"))

    def get(self, names: Sequence[str]) -> TensorDict:
        return self.data.select(*names)

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        self.data.update(dict(values))


def _rows_of_length(dataset: DemonstrationDataset, count: int, longest: int) -> list[dict[str, torch.Tensor]]:
    """The first rows of at most ``longest`` tokens, prompt and response."""
    rows = []
    for index in range(len(dataset)):
        row = dataset[index]
        if len(row["input_ids"]) <= longest:
            rows.append(row)
        if len(rows) == count:
            return rows
    raise SystemExit(f"only {len(rows)} rows of at most {longest} tokens")


def compose_config(arguments: argparse.Namespace) -> DictConfig:
    overrides = [
        f"model.path={arguments.student}",
        "model.enable_gradient_checkpointing=false",
        f"teacher.model.path={arguments.teacher}",
        f"data.train_files={arguments.data}",
        f"data.train_batch_size={arguments.rows}",
        f"data.max_prompt_length={arguments.longest}",
        f"data.max_response_length={arguments.longest}",
        f"trainer.device={get_device_name()}",
        "optim.lr_scheduler_type=constant",
    ]
    with initialize_config_dir(str(config_dir()), version_base=None):
        config = compose("sft_trainer", overrides=overrides)
    write_row_layouts(config)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--longest", type=int, default=256, help="tokens of prompt and response")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", help="some implementations; verl_sft is always one of them")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "step.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, value in ALONE.items():  # unless torchrun set them
        os.environ.setdefault(name, value)
    initialize_global_process_group()
    store = Path(tempfile.gettempdir()) / f"teacher_store_{os.environ['MASTER_PORT']}_{os.getppid()}"  # of all ranks
    try:
        steps = Steps(compose_config(arguments), arguments.rows, arguments.longest, store)
        make: dict[str, Callable[[], Step]] = {
            "verl_sft": steps.verl_sft,
            "sft": partial(steps.one_pass, objective="sft"),
            "staged": steps.staged,
            "one_pass": steps.one_pass,
            "one_pass_bf16": steps.bf16_teacher,
            "one_pass_stored": partial(steps.stored, "hidden"),
            "one_pass_topk": partial(steps.stored, "topk"),
        }
        on_gpu = get_device_name() != "cpu"
        if on_gpu:
            del make["one_pass_bf16"]  # its teacher is in bfloat16 anyway
        chosen = [name for name in make if not arguments.only or name in ["verl_sft", *arguments.only]]
        functions = {name: make[name]() for name in chosen}
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        peak_gib: dict[str, float] = {}
        device = get_torch_device()
        for repeat in range(arguments.repeats + 1):
            for name, function in functions.items():
                if on_gpu:
                    device.reset_peak_memory_stats()
                start = time.perf_counter()
                function()
                device.synchronize()
                if repeat:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
                if on_gpu:
                    peak_gib[name] = round(device.max_memory_allocated() / 2**30, 2)
    finally:
        shutil.rmtree(store, ignore_errors=True)  # another rank may be first
    if torch.distributed.get_rank() != 0:
        return

    tokens = sum(len(row["input_ids"]) for row in steps.rows)  # of this rank
    response_tokens = sum(len(row["responses"]) for row in steps.rows)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, taken in median.items():
        rows.append(
            {
                **machine(),
                "threads": arguments.threads,
                "student": arguments.student.name,
                "teacher": arguments.teacher.name,
                "ranks": torch.distributed.get_world_size(),
                "rows": arguments.rows,
                "tokens": tokens,
                "response_tokens": response_tokens,
                "implementation": name,
                "seconds": round(taken, 4),
                "ratio": round(taken / median["verl_sft"], 3),
                **({"gpu": device.get_device_name(), "peak_gib": peak_gib[name]} if on_gpu else {}),
            }
        )
        memory = f"{peak_gib[name]:8.2f} GiB" if on_gpu else ""
        print(f"{name:18} {taken:8.3f} s {taken / median['verl_sft']:6.2f} x {memory}", flush=True)
    append_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
