"""The lean trainer: HPD on demonstrations, by verl's SFT trainer and engine, without Ray.

    torchrun --standalone --nproc_per_node=1 -m hpd_verl.sft.trainer \
        model.path=STUDENT teacher.model.path=TEACHER data.train_files=train.parquet

Settings: configs/sft_trainer.yaml. The objectives, the output layer and the teacher's store are those of main_ppo's
one-pass pipeline.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
import torch
import torch.distributed
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group
from verl.utils.metric import Metric, reduce_metrics
from verl.utils.tracking import Tracking
from verl.workers.config import TrainingWorkerConfig

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.engine.ranks import seed_rank, sums_of_ranks
from hpd_verl.engine.saved_model import SavedModelError
from hpd_verl.engine.student_checkpoints import StudentCheckpoints
from hpd_verl.errors import Refused
from hpd_verl.hydra_config import config_dir
from hpd_verl.pipelines.one_pass import OnePass, StudentWorker
from hpd_verl.pipelines.updates import over_own_tokens
from hpd_verl.run import checkpoint
from hpd_verl.run.choices import with_dtype
from hpd_verl.run.stopping import EXIT_CODE, StopSignals, learn_of_stops
from hpd_verl.sft.demonstrations import DemonstrationDataset, LookAhead, PaddedRows, as_batch, read_demonstrations
from hpd_verl.sft.start import checked, log_store_size, teacher_settings, write_row_layouts
from hpd_verl.teacher.choice import make_teacher
from hpd_verl.teacher.prompt_date import fix_prompt_date
from hpd_verl.teacher.teacher import TeacherUnavailable

Value = TypeVar("Value")


class HPDSFTTrainer(SFTTrainer):
    """verl's SFT trainer with a teacher."""

    previous_checkpoint: Path | None
    train_dataloader: Any

    def __init__(self, config: DictConfig) -> None:
        self.hpd = HPDConfig.from_config(config.algorithm.hpd)
        self.checkpoint_root = Path(config.trainer.default_local_dir).absolute()
        write_row_layouts(config)
        super().__init__(config)
        if self.previous_checkpoint is not None and self.one_pass.teacher is not None:
            self.one_pass.teacher.resume(self.previous_checkpoint)

    def _build_config(self) -> None:
        super()._build_config()
        self.engine_config = omega_conf_to_dataclass(with_dtype(self.config.engine))

    def _build_dataset(self) -> None:
        data = self.config.data
        fix_prompt_date(data, self.hpd, self.model_config.tokenizer.chat_template)
        self.train_dataset = self._read(data.train_files, data.train_max_samples)
        self.val_dataset = self._read(data.val_files, data.val_max_samples) if data.val_files else None
        rows, batch_size = len(self.train_dataset), self.config.data.train_batch_size
        if rows < batch_size:
            raise ValueError(
                f"data.train_batch_size={batch_size}: data.train_files has {rows} rows, less than one batch; lower it"
            )
        if torch.distributed.get_rank() == 0:
            datasets = [self.train_dataset] if self.val_dataset is None else [self.train_dataset, self.val_dataset]
            log_store_size(self.config, self.hpd, datasets)

    def _read(self, files: Any, max_samples: int) -> DemonstrationDataset:
        return read_demonstrations(self.config, self.model_config, files, max_samples)

    def _build_engine(self) -> None:
        data = self.config.data  # verl tells it with each batch only
        self.engine_config.use_dynamic_bsz = data.use_dynamic_bsz
        self.engine_config.micro_batch_size_per_gpu = data.micro_batch_size_per_gpu
        self.engine_config.infer_max_token_len_per_gpu = data.max_token_len_per_gpu
        self.engine_config.infer_micro_batch_size_per_gpu = data.micro_batch_size_per_gpu
        self.training_client = StudentWorker(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=self.model_config,
                engine_config=self.engine_config,
                optimizer_config=self.optimizer_config,
                checkpoint_config=self.checkpoint_config,
                profiler_config=self.profiler_config,
            )
        )
        self.engine = self.training_client.engine

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        self.train_sampler.seed = self.config.data.seed
        if self.val_dataset is None:
            return
        # verl's drops rows that do not fill a batch. Here every row counts once, on all ranks together.
        rank, ranks = self.engine.get_data_parallel_rank(), self.engine.get_data_parallel_size()
        data = self.config.data
        rows = PaddedRows(self.val_dataset, ranks * (1 if data.use_dynamic_bsz else data.micro_batch_size_per_gpu))
        self.val_dataloader = DataLoader(
            rows,
            batch_size=self.train_batch_size_per_dp,
            sampler=DistributedSampler(rows, num_replicas=ranks, rank=rank, shuffle=False),
            collate_fn=self.collate_fn,
            num_workers=data.num_workers,
        )

    def _init_engine(self) -> None:
        seed_rank(self.hpd.seed)
        super()._init_engine()
        self.engine.checkpoint_manager = StudentCheckpoints(self.engine, self.hpd.check_saved_model)
        teacher = None
        if self.hpd.needs_teacher:
            settings = teacher_settings(self.config, self.hpd)
            teacher = make_teacher(settings, self.hpd, self.model_config, self.training_client)
        self.one_pass = OnePass(
            self.training_client,
            teacher,
            self.hpd,
            self.config.trainer.loss_agg_mode,
            loss_scale_factor=self.config.data.max_response_length,
        )

    def _batch(self, tensors: Mapping[str, Any], step: int) -> TensorDict:
        return as_batch(self.config, self.model_config, tensors, step, self.total_training_steps)

    def _train_step(
        self, tensors: Mapping[str, Any], step: int, following: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        start = time.perf_counter()
        data = self._batch(tensors, step)
        if following is not None and self.one_pass.teacher is not None:
            self.one_pass.following = self._batch(following, step + 1)
        tu.assign_non_tensor(
            data, mini_batch_size=self.global_batch_size, epochs=1, seed=0, dataloader_kwargs={"shuffle": False}
        )
        output = self.one_pass.update(data)
        flags = sums_of_ranks([tensors[flag].values().sum().item() for flag in fields.COUNTED_FLAGS])
        flags = [
            count / self.engine.ulysses_sequence_parallel_size for count in flags
        ]  # whose ranks have the same rows
        if output is None:
            return {}
        metrics = over_own_tokens(_train_names(reduce_metrics(tu.get(output, "metrics"))))
        if not math.isfinite(metrics["actor/grad_norm"]):
            raise FloatingPointError(
                f"step {step}: the gradient's norm is {metrics['actor/grad_norm']}; verl skipped the update; the run "
                "stops"
            )
        metrics |= dict(zip(fields.COUNTED_FLAGS.values(), map(int, flags), strict=True))
        metrics["hpd/dropped_demonstrations"] = self.train_dataset.rows.dropped_demonstrations
        metrics["training/global_step"] = step
        metrics["timing_s/step"] = time.perf_counter() - start
        return metrics

    def _validate(self, step: int) -> dict[str, float]:
        """The metrics of the validation rows, the same on any number of ranks and for any batch size.

        The loss is that of all rows as one batch, the others are means over their response tokens.
        """
        sums: dict[str, float] = {}
        loss, tokens = 0.0, 0.0
        assert self.val_dataset is not None
        assert self.val_dataloader is not None
        for tensors in self.val_dataloader:
            data = self._batch(tensors, step)
            tu.assign_non_tensor(data, global_batch_size=len(self.val_dataset))
            output = self.one_pass.evaluate(data)
            if output is None:
                continue
            metrics = {
                name: float(Metric.aggregate_dp(value) if isinstance(value, list) else value.aggregate())
                for name, value in tu.get(output, "metrics").items()
                if isinstance(value, Metric) or (isinstance(value, list) and isinstance(value[0], Metric))
            }
            count = metrics.pop("hpd/response_tokens")
            # Means were taken over this batch's tokens; the loss of the other aggregations adds up as it is.
            weight = count if self.one_pass.loss.loss_agg_mode == "token-mean" else 1.0
            loss += weight * metrics.pop("hpd/loss")
            tokens += count
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + count * value
        if tokens == 0.0:
            return {}
        loss = loss / tokens if self.one_pass.loss.loss_agg_mode == "token-mean" else loss
        means = over_own_tokens({name: value / tokens for name, value in sums.items()})
        return {f"val/{name}": value for name, value in means.items()} | {"val/hpd/loss": loss}

    def fit(self, signals: StopSignals) -> None:
        """Train until ``trainer.total_training_steps`` or ``total_epochs``, resuming where a checkpoint is.

        Ends the process, once the step under way is saved, where ``signals`` ask any rank for it.
        """
        signals.ask = lambda: True
        learn_of_stops(lambda: signals.asked_by is not None)
        trainer = self.config.trainer
        leads = self.engine.is_mp_src_rank_with_outputs() and self.engine.get_data_parallel_rank() == 0
        tracking = None
        if leads:
            tracking = Tracking(
                project_name=trainer.project_name,
                experiment_name=trainer.experiment_name,
                default_backend=trainer.logger,
                config=OmegaConf.to_container(self.config, resolve=True),
            )
        step = self.resume_global_step
        bar = tqdm(total=self.total_training_steps, initial=step, desc="training", unit="step", disable=not leads)
        while step < self.total_training_steps:
            self.train_sampler.set_epoch(step // self.steps_per_epoch)
            for tensors, following in self.train_dataloader.pairs():
                step += 1
                try:
                    metrics = self._train_step(tensors, step, following)
                except TeacherUnavailable as error:
                    raise self._without_teacher(step - 1, error, signals) from error
                self.train_dataloader.trained()
                is_last = step >= self.total_training_steps
                saves = is_last or (self.save_freq > 0 and step % self.save_freq == 0)
                stops = self._is_asked(signals)
                if stops:
                    self._save(step)  # before a validation for which there may be no time
                if self.val_dataloader is not None and (is_last or (self.test_freq > 0 and step % self.test_freq == 0)):
                    try:
                        metrics |= self._validate(step)
                    except TeacherUnavailable as error:
                        raise self._without_teacher(step, error, signals) from error
                    if not stops and (stops := self._is_asked(signals)):
                        self._save(step)
                if tracking is not None:
                    tracking.log(data=metrics, step=step)
                    bar.update()
                    bar.set_postfix(loss=f"{metrics['hpd/loss']:.4f}")
                if saves and not stops:
                    self._save(step)
                if stops and not is_last:
                    bar.close()
                    destroy_global_process_group()
                    signals.end(step, self.total_training_steps, str(self.previous_checkpoint))
                if is_last:
                    break
        bar.close()

    def _without_teacher(self, step: int, error: TeacherUnavailable, signals: StopSignals) -> TeacherUnavailable:
        """Save the last step that was made; the error with where that is. Ends the process where that is asked for."""
        if step > self.resume_global_step and self.previous_checkpoint != self.checkpoint_root / f"global_step_{step}":
            self._save(step)
        if self._is_asked(signals):
            destroy_global_process_group()
            signals.end(step, self.total_training_steps, str(self.previous_checkpoint) if step else None)
        return type(error)(f"{error} (step {step} is saved: {self.previous_checkpoint})" if step else str(error))

    def _is_asked(self, signals: StopSignals) -> bool:
        """Whether a signal asked any rank to end the run, the same on all of them."""
        asked = torch.tensor(int(signals.asked_by is not None), device=self.device_name)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _build_ckpt_handler(self) -> None:
        """verl's, told which checkpoint to resume from and that old ones are removed here."""
        ahead = self.hpd.teacher_server.prefetch if self.hpd.teacher_server.urls else 0
        self.train_dataloader = LookAhead(self.train_dataloader, bool(ahead))
        super()._build_ckpt_handler()
        handler = self.ckpt_handler
        handler.max_ckpt_to_keep = None
        if handler.resume_mode == "auto" and handler.resume_from_path is None:
            found = _of_rank_0(lambda: checkpoint.checkpoint_to_resume(self.checkpoint_root, checkpoint.LEAN))
            handler.resume_mode = "disable" if found is None else "resume_path"
            handler.resume_from_path = None if found is None else str(found)
        resumed = None if handler.resume_mode == "disable" else handler.resume_from_path
        self.previous_checkpoint = Path(resumed).absolute() if resumed else None
        if self.previous_checkpoint is not None:
            own = f"data_{handler.dp_rank}.pt"
            checkpoint.check_pickles(self.previous_checkpoint, "trainer.resume_from_path", own)
        if self.previous_checkpoint is not None and torch.distributed.get_rank() == 0:
            checkpoint.say_changed_rows(self.previous_checkpoint, self.train_dataset.rows.fingerprint)

    def _save(self, step: int) -> None:
        """Save, mark the checkpoint complete, and only then remove old ones."""
        root, keep = self.checkpoint_root, self.config.trainer.max_ckpt_to_keep
        leads = torch.distributed.get_rank() == 0
        if leads:
            checkpoint.mark_incomplete(root, step, self.previous_checkpoint)
        torch.distributed.barrier()
        self.ckpt_handler.save_checkpoint(step=step)
        if self.one_pass.teacher is not None:
            self.one_pass.teacher.save(root / f"global_step_{step}")
        torch.distributed.barrier()
        if leads:
            checkpoint.save_settings(root, step, self.config)
            checkpoint.save_rows(root, step, self.train_dataset.rows.fingerprint)
            checkpoint.mark_complete(root, step, keep)
        self.previous_checkpoint = root / f"global_step_{step}"
        old = _of_rank_0(lambda: checkpoint.checkpoints_to_remove(root, keep, checkpoint.LEAN))
        if leads:
            checkpoint.remove(old)
        torch.distributed.barrier()
        for folder in old:  # where ranks have disks of their own
            checkpoint.remove_files(folder)


def _of_rank_0(make: Callable[[], Value]) -> Value:
    """The result of ``make`` on rank 0, on every rank."""
    values = [make() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(values, src=0)
    return cast(Value, values[0])


def _train_names(metrics: dict[str, Any]) -> dict[str, float]:
    """verl's own metrics get the prefix they have under main_ppo."""
    return {name if "/" in name else f"actor/{name}": float(value) for name, value in metrics.items()}


@hydra.main(config_path=str(config_dir()), config_name="sft_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Check settings, data and models before anything loads, then train."""
    signals = StopSignals(ask=lambda: False, says=os.environ.get("RANK", "0") == "0")
    signals.install()
    checkpoint.remember_environment()
    checked(config)
    initialize_global_process_group()
    try:
        HPDSFTTrainer(config).fit(signals)
    except TeacherUnavailable as error:
        print(f"Error: {error}, exit code {EXIT_CODE}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
    except (Refused, SavedModelError) as error:  # what only the loaded models show
        sys.exit(f"Error: {error}")
    signals.ignore()
    destroy_global_process_group()


if __name__ == "__main__":
    main()
