"""verl's synchronous V1 trainer with a teacher, demonstrations and the student's sampled tokens.

One step keeps verl's order: responses (demonstrations or rollouts), then the pipeline's student pass, teacher pass,
weights and update. With nothing to generate there is no rollout server; with one, weights are synced only before
something is generated.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.metric import reduce_metrics
from verl.utils.seqlen_balancing import log_seqlen_unbalance
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from hpd_verl.checks.models import load_model_config
from hpd_verl.checks.row_layouts import choose_row_layout, model_nodes, write_row_layout
from hpd_verl.checks.start import DATASET_MODULE, check_fetched_models, check_main_ppo, main_ppo_passes
from hpd_verl.checks.teacher_server import check_teacher_server
from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.dataset import DEMONSTRATION, HPDDataset
from hpd_verl.data.demonstration import has_demonstration
from hpd_verl.data.on_policy import advantages, choose_rollouts, rollout_quota, shared_prompts
from hpd_verl.data.teacher_prompt import max_teacher_prompt_length
from hpd_verl.objectives.context import ADVANTAGE, REWARD
from hpd_verl.pipelines.choice import PIPELINES
from hpd_verl.pipelines.updates import over_own_tokens, rows_of_ranks
from hpd_verl.ppo import messages
from hpd_verl.ppo.queue_batch import QueueBatch
from hpd_verl.ppo.teacher_columns import TeacherColumns
from hpd_verl.ppo.teacher_servers import TeacherServers, check_gpus, server_options
from hpd_verl.ppo.worker import HPDWorker, HPDWorkerWithoutRollout
from hpd_verl.run import checkpoint
from hpd_verl.run.choices import choose_pipeline, compares_rollouts, needs_rollout_server, updates_per_batch
from hpd_verl.teacher.model_config import teacher_model_config, teacher_nodes
from hpd_verl.teacher.prompt_date import fix_prompt_date
from hpd_verl.teacher.store.size import log_size
from hpd_verl.teacher.teacher import TeacherUnavailable

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.1
"""Seconds between looks for finished responses; verl's default of 2 would be most of a small step."""

TEACHER = "actor_rollout_ref.ref.model.path"

NO_ROLLOUT = "hpd_no_rollout"
"""``rollout.name`` of a run without a server. verl resolves the name even for an empty list of replicas."""

RolloutReplicaRegistry.register(NO_ROLLOUT, lambda: RolloutReplica)
checkpoint.remember_environment()  # before verl resolves the configuration, after which it makes the trainer


def _key_order(key: str) -> tuple[bool, int, int, int]:
    """Sort key of a sequence: prompt, session, output; verl's padding sequences (``pad...``) come last."""
    uid, session, output = key.rsplit("_", 2)
    is_padding = uid.startswith("pad")
    return is_padding, 0 if is_padding else int(uid.split("r")[1]), int(session), int(output)


@register_trainer("hpd")
class HPDTrainer(PPOTrainerSync):
    """``trainer.v1.trainer_mode=hpd``."""

    total_training_steps: int
    train_dataloader: Any

    def __init__(self, config: DictConfig) -> None:
        if not messages.is_checked():
            logger.info("the trainer checks settings, data and models: the driver has not said that it did")
            check_main_ppo(config)
        hpd = HPDConfig.from_config(config.algorithm.hpd)
        pipeline, reason = choose_pipeline(config, hpd)
        logger.info("pipeline %s: %s", pipeline, reason)
        with open_dict(config):
            config.actor_rollout_ref.hpd.pipeline = pipeline  # what the workers read
        self.hpd = hpd.model_copy(update={"pipeline": pipeline})
        self.pipeline = PIPELINES[pipeline].driver(
            self.hpd, updates_per_batch(config), compares_rollouts(config, self.hpd)
        )
        student = check_fetched_models(config, hpd)
        fix_prompt_date(config.data, self.hpd, student.tokenizer.chat_template)
        nodes = config.actor_rollout_ref
        names = ("actor_rollout_ref.model", "actor_rollout_ref.ref.model")
        passes = main_ppo_passes(config, pipeline)
        self.student = student
        for model in model_nodes(nodes.model, teacher_nodes(nodes.ref, hpd), names):
            write_row_layout(model, choose_row_layout(model, passes))
        if self.hpd.teacher_server.n_gpus_per_node:
            self._start_teacher(config, student)
        self.serves_rollouts = needs_rollout_server(config, self.hpd)
        if not self.serves_rollouts:
            self._enable_hybrid_replicas = False  # verl's switch for an empty list of replicas
            with open_dict(config):
                config.actor_rollout_ref.rollout.name = NO_ROLLOUT
                config.actor_rollout_ref.rollout.nnodes = 1  # verl asserts a place for replicas, however few
                config.reward.num_workers = 0  # demonstrations earn no reward: no process waits to give one
        self.server_is_awake = False
        self.is_stopping = False
        self.prompts: dict[str, int] = {}
        """The batch's prompts, by the names of its rows."""
        self.row_columns: dict[str, dict[str, float]] = {}
        """Columns of the data that objectives need, by name and by the names of the batch's rows."""
        super().__init__(config)
        self.use_reference_policy = True  # the teacher; verl derives this from its own KL terms

    def _start_teacher(self, config: DictConfig, student: HFModelConfig) -> None:
        """Start the teacher's servers; from here on they are servers that are there."""
        settings, nodes = self.hpd.teacher_server, config.actor_rollout_ref
        check_gpus(settings, config.trainer.n_gpus_per_node * config.trainer.nnodes)
        options = server_options(config, settings.tensor_model_parallel_size)
        self.teacher_servers = TeacherServers(settings, options, Path(config.trainer.default_local_dir).absolute())
        started = settings.started(self.teacher_servers.urls)
        with open_dict(config):
            nodes.hpd.teacher_server = started.model_dump()  # what the workers read
        self.hpd = self.hpd.model_copy(update={"teacher_server": started})
        teacher = load_model_config(teacher_model_config(nodes.model, nodes.ref.model), TEACHER)
        longest = max_teacher_prompt_length(config.data) + config.data.max_response_length
        check_teacher_server(self.hpd, TEACHER, teacher, student, longest)

    def _build_replay_buffer(self) -> ReplayBuffer:
        self.trainer_mode = "sync"  # verl's base class picks buffer and checkpoint content by this name
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = POLL_INTERVAL
        return replay_buffer

    def _init_dataloader(self) -> None:
        with _settings(self.config.data, files_are_checked=self.config.data.custom_cls.path == DATASET_MODULE):
            super()._init_dataloader()
        rows, batch_size = len(self.train_dataset), self.config.data.train_batch_size
        if rows < batch_size:
            raise ValueError(
                f"data.train_batch_size={batch_size}: data.train_files has {rows} rows, less than one batch; lower it"
            )
        models = self.config.actor_rollout_ref
        teachers = teacher_nodes(models.ref, self.hpd)
        log_size(self.hpd, models.model, teachers, [self.train_dataset], self.config.data.max_response_length)
        self.teacher_columns = TeacherColumns.of(self.config, self.hpd, self.student)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        # Student and teacher always share a worker, with LoRA too: there verl would take the student itself,
        # without its adapter, as the reference.
        worker = HPDWorker if self.serves_rollouts else HPDWorkerWithoutRollout
        for role in (Role.Actor, Role.ActorRollout, Role.RefPolicy):
            self.role_worker_mapping.pop(role, None)
            self.mapping.pop(role, None)
        self.role_worker_mapping[Role.ActorRolloutRef] = ray.remote(worker)
        self.mapping[Role.ActorRolloutRef] = "global_pool"

    # ------------------------------ rollout server ------------------------------

    def _sync_server(self) -> None:
        self.checkpoint_manager.update_weights(self.global_steps)
        self.server_is_awake = True

    def _may_generate(self, step: int) -> bool:
        if self.hpd.missing_demonstration == "rollout":
            return True
        return rollout_quota(self.hpd.schedule, step, self.config.data.train_batch_size) > 0

    def on_init_end(self) -> None:
        if self.serves_rollouts and (self.config.trainer.val_before_train or self._may_generate(self.global_steps + 1)):
            self._sync_server()

    def on_step_end(self) -> None:
        is_last = self.global_steps >= self.total_training_steps
        test_freq = self.config.trainer.test_freq
        validates_now = test_freq > 0 and (is_last or self.global_steps % test_freq == 0)
        self._stop_if_asked()
        generates_next = not (is_last or self.is_stopping) and self._may_generate(self.global_steps + 1)
        if self.serves_rollouts and (validates_now or generates_next):
            super().on_step_end()
            self.server_is_awake = True

    def on_sample_end(self) -> None:
        if self.server_is_awake:
            super().on_sample_end()
            self.server_is_awake = False

    # ------------------------------ one batch, left to right ------------------------------

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        """The next prompts, numbered within the batch, each marked as demonstration or rollout."""
        self.state_before = self.train_dataloader.state_dict()
        batch = super()._next_train_batch(num_prompts)
        rows = len(batch)
        demonstrations = list(batch[DEMONSTRATION]) if DEMONSTRATION in batch else [None] * rows
        missing = [not has_demonstration(value) for value in demonstrations]
        sources = [str(source) for source in batch["data_source"]] if "data_source" in batch else [""] * rows
        quota = rollout_quota(self.hpd.schedule, self.global_steps, rows)
        on_policy = choose_rollouts(sources, missing, quota, self.hpd.seed, self.global_steps)
        takes = shared_prompts(on_policy, self.hpd.rollouts_per_prompt)
        batch = tu.index_select_tensor_dict(batch, takes)
        uids = [f"{self.global_steps}r{row}" for row in range(rows)]
        named = tu.get_tensordict(
            {"uid": np.array(uids, dtype=object), fields.ON_POLICY: np.array(on_policy, dtype=object)}
        )
        batch["uid"], batch[fields.ON_POLICY] = named["uid"], named[fields.ON_POLICY]
        self.prompts = dict(zip(uids, takes, strict=True))
        self.row_columns = {}
        for name in self.hpd.row_columns:
            self.row_columns[name] = dict(zip(uids, map(float, batch[fields.row_number(name)]), strict=True))
            del batch[fields.row_number(name)]
        self.teacher_columns.take(batch, uids)
        self.on_policy_uids = {uid for uid, flag in zip(uids, on_policy, strict=True) if flag}
        self.batch_counts = {
            "hpd/on_policy_fraction": sum(on_policy) / rows,
            "hpd/missing_demonstrations": sum(missing),
            "hpd/left_out_prompts": rows - len(set(takes)),
            "hpd/dropped_demonstrations": getattr(self.train_dataset, "dropped_demonstrations", 0),
        }
        return batch

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict[str, Any], **kwargs: Any) -> KVBatchMeta:
        """Sequences in a reproducible order, numbered in it; ranks share each update's, balanced as verl does."""
        expected = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        if len(batch) < expected:
            raise RuntimeError(
                f"step {self.global_steps}: {expected - len(batch)} of {expected} responses failed; "
                "the agent loop workers' errors are in the log above"
            )
        batch.reorder(sorted(range(len(batch)), key=lambda index: _key_order(batch.keys[index])))
        for flag, metric in fields.COUNTED_FLAGS.items():
            self.batch_counts[metric] = sum(bool(tag.get(flag)) for tag in batch.tags)
        self.batch_counts["hpd/truncated_prompts"] += self._truncated_rollout_prompts(batch)
        self.batch_counts["hpd/truncated_teacher_prompts"] = self.teacher_columns.truncated(batch.keys)
        metrics.update(self.batch_counts)
        batch = super()._balance_batch(batch, metrics=metrics, **kwargs)
        # verl's padding stays. Its order would make the rows of an update depend on the number of ranks.
        batch.reorder(sorted(range(len(batch)), key=lambda index: _key_order(batch.keys[index])))
        lengths = [tag["seq_len"] for tag in batch.tags]
        mini_batch_size = self.config.actor_rollout_ref.actor.ppo_mini_batch_size
        updates = len(batch) // (mini_batch_size * self.config.actor_rollout_ref.rollout.n)
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        parts = rows_of_ranks(lengths, updates, ranks)
        metrics.update(log_seqlen_unbalance(seqlen_list=lengths, partitions=parts, prefix="global_seqlen"))
        batch.reorder([row for part in parts for row in part])
        number = {key: index for index, key in enumerate(sorted(batch.keys, key=_key_order))}
        columns = {
            fields.ROW: torch.tensor([[number[key]] for key in batch.keys]),
            fields.IS_ROLLOUT: self._is_rollout(batch).long().unsqueeze(1),
            **self.teacher_columns.of_keys(batch.keys),
        }
        columns |= {
            fields.row_number(name): torch.tensor(values, dtype=torch.float32).unsqueeze(1)
            for name, values in self._row_numbers(batch).items()
        }
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(columns, batch_size=len(batch))
        )
        return batch

    def _row_numbers(self, batch: KVBatchMeta) -> dict[str, list[float]]:
        """What objectives need of each sequence's row, by name."""
        uids = [key.rsplit("_", 2)[0] for key in batch.keys]
        found = {name: [values.get(uid, math.nan) for uid in uids] for name, values in self.row_columns.items()}
        asked = {REWARD, ADVANTAGE} & set(self.hpd.row_numbers)
        if asked:
            rewards = [math.nan] * len(uids)
            rollouts = [index for index, is_rollout in enumerate(self._is_rollout(batch).tolist()) if is_rollout]
            for index, score in zip(
                rollouts, self._scores([batch.keys[index] for index in rollouts], batch), strict=True
            ):
                rewards[index] = score
            prompts = [self.prompts.get(uid, -1) for uid in uids]
            numbers = {REWARD: rewards, ADVANTAGE: advantages(rewards, prompts)}
            found |= {name: numbers[name] for name in asked}
        return found

    @staticmethod
    def _scores(keys: list[str], batch: KVBatchMeta) -> list[float]:
        """The rewards of rollouts."""
        if not keys:
            return []
        scores = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
        found: list[float] = scores["rm_scores"].to_padded_tensor(0).sum(-1).tolist()
        return found

    def _truncated_rollout_prompts(self, batch: KVBatchMeta) -> int:
        """Rollouts whose prompt was cut; verl's workers set their tags, so the agent loop leaves it in a field."""
        keys = [key for key, flag in zip(batch.keys, self._is_rollout(batch), strict=True) if flag]
        if not keys:
            return 0
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        return sum(bool(getattr(extra, "data", extra).get(fields.TRUNCATED_PROMPT)) for extra in data["extra_fields"])

    def _is_rollout(self, batch: KVBatchMeta) -> Tensor:
        """bool [rows]: the student answered the row itself."""
        return torch.tensor([key.rsplit("_", 2)[0] in self.on_policy_uids for key in batch.keys])

    def _queue_batch(self, batch: KVBatchMeta) -> QueueBatch:
        return QueueBatch(
            batch,
            self.global_steps,
            self.total_training_steps,
            self._is_rollout(batch),
            {"temperature": self.hpd.temperature, **self.pipeline.settings},
            student=self.actor_rollout_wg,
            teacher=self.ref_policy_wg,
        )

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        self.pipeline.student_pass(self._queue_batch(batch))
        return batch

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        self.pipeline.teacher_pass(self._queue_batch(batch))
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        metrics.update(self.pipeline.weigh(self._queue_batch(batch)))
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Update the student with the weighted log-likelihood of label and sampled tokens."""
        actor = self.config.actor_rollout_ref.actor
        mini_batch_size = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        output = self.actor_rollout_wg.update_actor(
            self._queue_batch(batch).for_worker(
                [*self.pipeline.update_inputs, *self.teacher_columns.names],
                calculate_entropy=actor.calculate_entropy or actor.entropy_coeff != 0,
                global_batch_size=mini_batch_size,
                mini_batch_size=mini_batch_size,
                epochs=actor.ppo_epochs,
                seed=actor.data_loader_seed,
                dataloader_kwargs={"shuffle": actor.shuffle},
                **{fields.COMPARES_ROLLOUTS: self.pipeline.compares_rollouts},
            )
        )
        output = over_own_tokens(reduce_metrics(output["metrics"]))
        metrics.update({name if "/" in name else f"actor/{name}": value for name, value in output.items()})
        metrics["perf/mfu/actor"] = metrics.pop("actor/mfu")
        if not math.isfinite(metrics["actor/grad_norm"]):
            raise FloatingPointError(
                f"step {self.global_steps}: the gradient's norm is {metrics['actor/grad_norm']}; verl skipped the "
                "update; the run stops"
            )
        return batch

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        """Lengths, time and throughput. verl's own are those of rewards and advantages, which HPD does not have."""
        tags = [tag for tag in batch.tags if not tag.get("is_padding", False)]
        prompts, responses = ([tag[name] for tag in tags] for name in ("prompt_len", "response_len"))
        tokens = sum(prompts) + sum(responses)
        metrics.update({f"timing_s/{name}": seconds for name, seconds in timing_raw.items()})
        metrics.update(
            {
                "training/global_step": global_steps,
                "training/epoch": epoch,
                "prompt_length/mean": sum(prompts) / len(tags),
                "prompt_length/max": max(prompts),
                "response_length/mean": sum(responses) / len(tags),
                "response_length/max": max(responses),
                "perf/total_num_tokens": tokens,
                "perf/time_per_step": timing_raw["step"],
                "perf/throughput": tokens / (timing_raw["step"] * self._get_n_gpus_for_throughput()),
            }
        )
        if self.hpd.score_rollouts and self._is_rollout(batch).any():
            keys = [key for key, is_rollout in zip(batch.keys, self._is_rollout(batch), strict=True) if is_rollout]
            scores = self._scores(keys, batch)
            metrics["hpd/rollout_score"] = sum(scores) / len(scores)

    # ------------------------------ checkpoints ------------------------------

    def _checkpoint_root(self) -> Path:
        return Path(self.config.trainer.default_local_dir).absolute()

    def _load_checkpoint(self) -> None:
        """verl's, of the checkpoint that ``checkpoint.py`` chooses where verl would take its tracker's."""
        trainer = self.config.trainer
        chosen: dict[str, Any] = {}
        self.previous_checkpoint: Path | None = None
        if trainer.resume_mode == "auto":
            self.previous_checkpoint = checkpoint.checkpoint_to_resume(self._checkpoint_root())
            chosen = {"resume_mode": "disable"}
            if self.previous_checkpoint is not None:
                chosen = {"resume_mode": "resume_path", "resume_from_path": str(self.previous_checkpoint)}
        elif trainer.resume_mode == "resume_path" and trainer.resume_from_path:
            self.previous_checkpoint = Path(trainer.resume_from_path).absolute()
        logger.info("resuming from %s", self.previous_checkpoint or "the beginning")
        if self.previous_checkpoint is not None:  # the driver may have been on another machine
            checkpoint.check_pickles(self.previous_checkpoint, "trainer.resume_from_path", "*.pt")
        if self.previous_checkpoint is not None and isinstance(self.train_dataset, HPDDataset):
            checkpoint.say_changed_rows(self.previous_checkpoint, self.train_dataset.fingerprint)
        with _settings(trainer, **chosen):
            super()._load_checkpoint()

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """verl's; where the teacher gives no features any more, the run ends with a checkpoint of its last step."""
        try:
            super().fit(*args, **kwargs)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, TeacherUnavailable):
                raise
            self._end_without_teacher(str(error.cause))

    def _end_without_teacher(self, error: str) -> None:
        """Save the last step that was made, with the data's order as it was before the one that failed."""
        self.global_steps -= 1
        saved = self._checkpoint_root() / f"global_step_{self.global_steps}"
        if self.global_steps > self.first_step and self.previous_checkpoint != saved:
            self.train_dataloader = _WithState(self.train_dataloader, self.state_before)
            self._save_checkpoint()
        if self.previous_checkpoint is not None:
            error = f"{error} (step {self.global_steps} is saved: {self.previous_checkpoint})"
        where = messages.Stopped(self.global_steps, self.total_training_steps, str(self.previous_checkpoint), error)
        messages.say_stopped(where)

    def on_train_begin(self) -> None:
        super().on_train_begin()
        self.first_step = self.global_steps - 1  # that the run goes on from
        messages.say_begun()

    def on_validate_end(self) -> None:
        super().on_validate_end()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Save this step, and make it the last: what verl does after it, as its validation, still happens."""
        is_last = self.global_steps >= self.total_training_steps
        if is_last or not messages.is_asked():
            return
        saved = self._checkpoint_root() / f"global_step_{self.global_steps}"
        if self.previous_checkpoint != saved:
            self._save_checkpoint()
        messages.say_stopped(messages.Stopped(self.global_steps, self.total_training_steps, str(saved)))
        self.is_stopping = True
        self.total_training_steps = self.global_steps

    def _save_checkpoint(self) -> None:
        """verl's; old checkpoints are removed only after the new one is marked complete."""
        root, trainer = self._checkpoint_root(), self.config.trainer
        keep = 1 if trainer.get("remove_previous_ckpt_in_save", False) else trainer.get("max_actor_ckpt_to_keep", None)
        checkpoint.mark_incomplete(root, self.global_steps, self.previous_checkpoint)
        with _settings(trainer, max_actor_ckpt_to_keep=None, remove_previous_ckpt_in_save=False):
            super()._save_checkpoint()
        checkpoint.save_settings(root, self.global_steps, self.config)
        if isinstance(self.train_dataset, HPDDataset):
            checkpoint.save_rows(root, self.global_steps, self.train_dataset.fingerprint)
        checkpoint.mark_complete(root, self.global_steps, keep)
        self.previous_checkpoint = root / f"global_step_{self.global_steps}"
        old = checkpoint.checkpoints_to_remove(root, keep)
        if old:
            checkpoint.remove(old)
            self.actor_rollout_wg.remove_checkpoints([str(folder) for folder in old])


@dataclass
class _WithState:
    """A loader with the state that it had earlier."""

    loader: Any
    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state


@contextmanager
def _settings(node: DictConfig, **values: Any) -> Iterator[None]:
    """Other values of a node's settings for the time of a call."""
    before = {name: node[name] for name in values if name in node}
    with open_dict(node):
        node.update(values)
    try:
        yield
    finally:
        with open_dict(node):
            for name in values:
                if name in before:
                    node[name] = before[name]
                else:
                    del node[name]
