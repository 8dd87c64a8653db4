"""verl's ActorRolloutRefWorker with a teacher: its reference model has a path of its own.

Three passes reach the models, all through verl's engine and its hook for logits (`logits processor`):
student pass (`compute_log_prob`), teacher pass (`compute_ref_log_prob`) and update (`update_actor`). In each, the
functions here turn logits into per-token log-probs; the names they carry are in `batch.py`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import open_dict
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import AggregationType, Metric
from verl.utils.profiler import DistProfiler
from verl.utils.ulysses import slice_input_tensor
from verl.workers.config import ActorConfig, HFModelConfig
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import no_padding_2_padding

from hpd_verl.checkpoint import remove_files
from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.response_tokens import row_numbers
from hpd_verl.head.sampling import counter_uniform, sample_tokens, token_log_probs
from hpd_verl.objectives import LOG_ZERO
from hpd_verl.pipelines.one_pass import OnePass, StudentWorker
from hpd_verl.pipelines.policy_loss import compute_hpd_policy_loss
from hpd_verl.teacher.model_config import teacher_model_config
from hpd_verl.teacher.teacher import TeacherWorker


def _local_part(values: Tensor, data: TensorDict) -> Tensor:
    """This rank's share of packed per-token values [total tokens], as Ulysses shares the sequence out."""
    if tu.get_non_tensor_data(data=data, key="sp_size", default=1) == 1:
        return values
    return slice_input_tensor(values.unsqueeze(0), dim=1).squeeze(0)


def _labels(data: TensorDict) -> Tensor:
    """The next token of each position, int64 [tokens of this rank]; meaningless at the end of each sequence."""
    return _local_part(torch.roll(data["input_ids"].values(), shifts=-1), data)


def _uniforms(data: TensorDict, config: HPDConfig) -> Tensor:
    """The numbers that the student's draws are made with, float64 [tokens of this rank, samples]."""
    lengths = data["input_ids"].offsets().diff()
    row = _local_part(torch.repeat_interleave(row_numbers(data), lengths), data)
    position = _local_part(data["position_ids"].values(), data)
    step = tu.get_non_tensor_data(data=data, key=fields.STEP, default=None)
    return torch.stack(
        [counter_uniform(config.seed, step, row, position, sample) for sample in range(config.num_student_samples)],
        dim=1,
    )


def _as_outputs(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """What verl expects of a logits processor: tensors of shape [1, tokens of this rank]."""
    return {name: values.unsqueeze(0) for name, values in named.items()}


class StudentLoss:
    """verl's loss function of the student, in the student pass and in the update.

    verl calls it twice per micro-batch: with ``student_logits`` for the log-probs, then with ``model_output`` for the
    loss. The update's batches carry weights; the student pass has no loss.

    Args:
        actor: the actor's configuration.
        hpd: the algorithm's configuration.
    """

    def __init__(self, actor: ActorConfig, hpd: HPDConfig) -> None:
        self.actor = actor
        self.hpd = hpd

    def __call__(self, data: TensorDict, student_logits: Tensor | None = None, **kwargs: Any) -> Any:
        updating = fields.LABEL_WEIGHTS in data
        if student_logits is not None:
            logits = student_logits.squeeze(0)
            return self._chosen_tokens(logits, data) if updating else self._draw(logits, data)
        if updating:
            return self._loss(kwargs["model_output"], data)
        return torch.zeros(()), {}

    def _draw(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        """Student pass: draw tokens at every position and take the log-probs."""
        label_log_probs, sampled, sampled_log_probs, entropy = sample_tokens(
            logits, _labels(data), _uniforms(data, self.hpd), self.hpd.token_chunk_size
        )
        outputs = {fields.STUDENT_LABEL_LOG_PROBS: label_log_probs, fields.ENTROPY: entropy}
        for sample in range(self.hpd.num_student_samples):
            outputs[fields.sampled_tokens(sample)] = sampled[:, sample]
            outputs[fields.student_sampled_log_probs(sample)] = sampled_log_probs[:, sample]
        return _as_outputs(outputs)

    def _chosen_tokens(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        """Update: differentiable log-probs of the label and the sampled tokens."""
        tokens = [_labels(data)]
        names = [fields.LABEL_LOG_PROBS]
        for sample in range(self.hpd.samples):
            tokens.append(_local_part(data[fields.sampled_tokens(sample)].values(), data))
            names.append(fields.sampled_log_probs(sample))
        log_probs = token_log_probs(logits, torch.stack(tokens, dim=1), self.hpd.token_chunk_size)
        return _as_outputs(dict(zip(names, log_probs.unbind(1), strict=True)))

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        """Update: the weighted log-likelihood of the label and of the sampled tokens (paper eq. 9, 14, 15)."""
        self.actor.global_batch_info.update(
            dp_size=data["dp_size"],
            batch_num_tokens=data["batch_num_tokens"],
            global_batch_size=data["global_batch_size"],
            loss_scale_factor=self.actor.loss_scale_factor,
        )
        terms = [(fields.LABEL_LOG_PROBS, fields.LABEL_WEIGHTS, fields.OLD_LABEL_LOG_PROBS)]
        terms += [
            (
                fields.sampled_log_probs(sample),
                fields.sampled_weights(sample),
                fields.old_sampled_log_probs(sample),
            )
            for sample in range(self.hpd.samples)
        ]
        has_ratio = fields.OLD_LABEL_LOG_PROBS in data
        response_fields = [name for _, weights, old in terms for name in ([weights, old] if has_ratio else [weights])]
        padded = data.select("response_mask", *response_fields).to_padded_tensor()
        response_mask = padded["response_mask"].bool()

        loss = torch.zeros((), device=response_mask.device)
        metrics: dict[str, Any] = {}
        for log_probs, weights, old in terms:
            term, term_metrics = compute_hpd_policy_loss(
                old_log_prob=padded[old] if has_ratio else None,
                log_prob=no_padding_2_padding(model_output[log_probs], data),
                advantages=padded[weights],
                response_mask=response_mask,
                loss_agg_mode=self.actor.loss_agg_mode,
                config=self.actor,
            )
            loss = loss + term
            metrics.update({name: [*metrics.get(name, []), value] for name, value in term_metrics.items()})
        # Micro-batches of one update add up to the global loss; verl averages over ranks.
        metrics = {name: Metric(AggregationType.MEAN, sum(values) / len(values)) for name, values in metrics.items()}
        metrics["hpd/loss"] = Metric(AggregationType.SUM, loss)
        if self.actor.entropy_coeff != 0:
            entropy = agg_loss(
                loss_mat=no_padding_2_padding(model_output["entropy"], data),
                loss_mask=response_mask,
                loss_agg_mode=self.actor.loss_agg_mode,
                **self.actor.global_batch_info,
            )
            loss = loss - self.actor.entropy_coeff * entropy
        return loss, metrics


class TeacherLogProbs:
    """verl's loss function of the teacher: log-probs of the label and of the student's draws, never a loss.

    Args:
        hpd: the algorithm's configuration.
        vocabulary_size: the teacher's logits that are used, those that the student has too; other tokens of the student
            have probability 0 (``objectives.LOG_ZERO``).
    """

    def __init__(self, hpd: HPDConfig, vocabulary_size: int) -> None:
        self.hpd = hpd
        self.vocabulary_size = vocabulary_size

    def __call__(self, data: TensorDict, student_logits: Tensor | None = None, **_: Any) -> Any:
        if student_logits is None:
            return torch.zeros(()), {}
        samples = range(self.hpd.num_student_samples)
        tokens = [_labels(data)]
        tokens += [_local_part(data[fields.sampled_tokens(sample)].values(), data) for sample in samples]
        names = [
            fields.TEACHER_LABEL_LOG_PROBS,
            *(fields.teacher_sampled_log_probs(sample) for sample in samples),
        ]
        logits = student_logits.squeeze(0)[:, : self.vocabulary_size]  # verl's name; these are the teacher's
        chosen = torch.stack(tokens, dim=1)
        known = chosen < logits.shape[1]
        log_probs = token_log_probs(logits, chosen.clamp_max(logits.shape[1] - 1), self.hpd.token_chunk_size)
        log_probs = torch.where(known, log_probs, LOG_ZERO)
        return _as_outputs(dict(zip(names, log_probs.unbind(1), strict=True)))


class HPDWorker(ActorRolloutRefWorker):
    """Student, its rollout adapter and the teacher, in one process per rank."""

    one_pass: OnePass | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Build teacher, student and rollout adapter, and give the two models their loss functions."""
        teacher: HFModelConfig = omega_conf_to_dataclass(teacher_model_config(self.config.model, self.config.ref.model))
        hpd = HPDConfig.from_config(self.config.hpd)
        with open_dict(self.config):
            del self.config.ref.model  # verl's dataclass of the reference does not know it
        one_pass = hpd.pipeline == "one_pass"
        self.ref_worker_cls = partial(TeacherWorker, model=teacher, lazy=one_pass)
        if one_pass:
            self.actor_worker_cls = StudentWorker
        super().init_model()
        actor_config: ActorConfig = self.loss_fn.keywords["config"]
        if one_pass:
            self.one_pass = OnePass(
                self.actor, self.ref, hpd, actor_config.loss_agg_mode, actor_config.loss_scale_factor
            )
        else:
            vocabulary_size = min(self.actor.model_config.hf_config.vocab_size, teacher.hf_config.vocab_size)
            self.actor.set_loss_fn(StudentLoss(actor_config, hpd))
            self.ref.set_loss_fn(TeacherLogProbs(hpd, vocabulary_size))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    @DistProfiler.annotate(color="red", role="actor_update", scheduled=True)
    def update_actor(self, data: TensorDict) -> TensorDict | None:
        """verl's update of the actor; in one pass, the teacher's features of these rows are taken first."""
        return super().update_actor(data) if self.one_pass is None else self.one_pass.update(data)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def remove_checkpoints(self, folders: list[str]) -> None:
        """Remove this machine's files of checkpoints that the driver gave up, where it has a disk of its own."""
        for folder in folders:
            remove_files(Path(folder))


class HPDWorkerWithoutRollout(HPDWorker):
    """The same for runs in which nothing is generated: no rollout adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.role = "actor_ref"  # verl builds what the role's name contains
        self._is_rollout = False
