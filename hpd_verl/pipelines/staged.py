"""The staged pipeline: student pass, teacher pass, weights, update; with PPO's ratio if a batch is several updates.

The passes go through verl's engine and its hook for logits, where the loss functions here turn logits into per-token
log-probs, under the names of ``data.fields``. In between the driver computes the weights, which stay fixed for a batch.
"""

import dataclasses
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.utils.metric import AggregationType, Metric
from verl.utils.ulysses import slice_input_tensor
from verl.workers.config import ActorConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested, response_to_nested

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.response_tokens import row_numbers
from hpd_verl.engine.row_engine import ROWS_MODEL_TYPE
from hpd_verl.head.metrics import token_metrics
from hpd_verl.head.sampling import counter_uniform, sample_tokens, token_log_probs
from hpd_verl.objectives import LOG_ZERO, TokenLogProbs
from hpd_verl.pipelines.advantage import compute_hpd_advantage
from hpd_verl.pipelines.pipeline import Batch, Driver, Pipeline, RankPipeline
from hpd_verl.pipelines.policy_loss import compute_hpd_policy_loss
from hpd_verl.pipelines.updates import RESPONSE_TOKENS, ROLLOUT_DIFFERENCE, train
from hpd_verl.teacher.colocated import TeacherWorker
from hpd_verl.teacher.model_config import shared_vocabulary_size

LOGITS_TO_LOSS = {"distillation_use_topk": True, "distillation_only": True}
"""verl's switches of a batch: pass logits to the loss function, and compute no log-probs."""


def _local_part(values: Tensor, data: TensorDict) -> Tensor:
    """This rank's share of packed per-token values [total tokens], as Ulysses shares the sequence out."""
    if tu.get_non_tensor_data(data=data, key="sp_size", default=1) == 1:
        return values
    return slice_input_tensor(values.unsqueeze(0), dim=1).squeeze(0)


def _labels(data: TensorDict) -> Tensor:
    """The next token of each position, int64 [tokens of this rank]; meaningless at the end of each sequence."""
    return _local_part(torch.roll(data["input_ids"].values(), shifts=-1), data)


def _uniforms(data: TensorDict, config: HPDConfig) -> Tensor:
    """The numbers that the student's tokens are sampled with, float64 [tokens of this rank]."""
    lengths = data["input_ids"].offsets().diff()
    row = _local_part(torch.repeat_interleave(row_numbers(data), lengths), data)
    position = _local_part(data["position_ids"].values(), data)
    step = tu.get_non_tensor_data(data=data, key=fields.STEP, default=None)
    return counter_uniform(config.seed, step, row, position)


def _as_outputs(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """As verl expects from a logits processor: tensors of shape [1, tokens of this rank]."""
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
        """Student pass: sample a token at every position and take the log-probs."""
        label_log_probs, sampled, sampled_log_probs, entropy = sample_tokens(
            logits, _labels(data), _uniforms(data, self.hpd), self.hpd.token_chunk_size
        )
        return _as_outputs(
            {
                fields.STUDENT_LABEL_LOG_PROBS: label_log_probs,
                fields.SAMPLED_TOKENS: sampled,
                fields.STUDENT_SAMPLED_LOG_PROBS: sampled_log_probs,
                fields.ENTROPY: entropy,
            }
        )

    def _chosen_tokens(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        """Update: differentiable log-probs of the label and the sampled token."""
        tokens = [_labels(data)]
        names = [fields.LABEL_LOG_PROBS]
        if self.hpd.objectives.weighs_sample:
            tokens.append(_local_part(data[fields.SAMPLED_TOKENS].values(), data))
            names.append(fields.SAMPLED_LOG_PROBS)
        log_probs = token_log_probs(logits, torch.stack(tokens, dim=1), self.hpd.token_chunk_size)
        return _as_outputs(dict(zip(names, log_probs.unbind(1), strict=True)))

    def _loss(self, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        """Update: the weighted log-likelihood of the label and of the sampled token (paper eq. 9, 14, 15)."""
        self.actor.global_batch_info.update(
            dp_size=data["dp_size"],
            batch_num_tokens=data["batch_num_tokens"],
            global_batch_size=data["global_batch_size"],
            loss_scale_factor=self.actor.loss_scale_factor,
        )
        terms = [(fields.LABEL_LOG_PROBS, fields.LABEL_WEIGHTS, fields.OLD_LABEL_LOG_PROBS)]
        if self.hpd.objectives.weighs_sample:
            terms += [(fields.SAMPLED_LOG_PROBS, fields.SAMPLED_WEIGHTS, fields.OLD_SAMPLED_LOG_PROBS)]
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
        # Micro-batches of one update add up to what is the global batch's; verl averages over ranks.
        metrics = {name: Metric(AggregationType.SUM, sum(values) / len(values)) for name, values in metrics.items()}
        metrics["hpd/loss"] = Metric(AggregationType.SUM, loss)
        metrics[RESPONSE_TOKENS] = Metric(AggregationType.SUM, response_mask.sum() * data["dp_size"])
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
    """verl's loss function of the teacher: log-probs of the label and of the sampled token, never a loss.

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
        tokens = [_labels(data), _local_part(data[fields.SAMPLED_TOKENS].values(), data)]
        names = [fields.TEACHER_LABEL_LOG_PROBS, fields.TEACHER_SAMPLED_LOG_PROBS]
        logits = student_logits.squeeze(0)[:, : self.vocabulary_size]  # verl's name; these are the teacher's
        chosen = torch.stack(tokens, dim=1)
        known = chosen < logits.shape[1]
        log_probs = token_log_probs(logits, chosen.clamp_max(logits.shape[1] - 1), self.hpd.token_chunk_size)
        log_probs = torch.where(known, log_probs, LOG_ZERO)
        return _as_outputs(dict(zip(names, log_probs.unbind(1), strict=True)))


class StagedDriver(Driver):
    """The student's and the teacher's pass, and the weights from their log-probs."""

    settings = LOGITS_TO_LOSS

    @property
    def uses_ratio(self) -> bool:
        """The update weighs by PPO's ratio to the student that made the batch's log-probs."""
        return self.updates_per_batch > 1 and not self.config.objectives.is_likelihood

    def student_pass(self, batch: Batch) -> None:
        batch.student_pass([])

    def teacher_pass(self, batch: Batch) -> None:
        batch.teacher_pass([fields.SAMPLED_TOKENS])

    def weigh(self, batch: Batch) -> dict[str, float]:
        """Turn log-probs into weights, and write these back.

        Raises:
            FloatingPointError: logits of a model were NaN; the message names step, model and rows.
        """
        data = batch.get(["response_mask", "responses", *self._pass_outputs()])
        nested_mask = data["response_mask"]
        response_mask = nested_mask.to_padded_tensor(0)
        log_probs = _token_log_probs(data)
        _refuse_nan(batch, log_probs)
        is_rollout = batch.is_rollout
        label_weights, sampled_weights = compute_hpd_advantage(
            response_mask=response_mask,
            objectives=self.config.objectives,
            log_probs=log_probs,
            is_rollout=is_rollout,
        )
        mask = response_mask.bool()
        per_token = token_metrics(log_probs, label_weights, sampled_weights, _response(data, fields.ENTROPY))
        metrics = {name: values[mask].double().mean().item() for name, values in per_token.items()}
        if self.compares_rollouts and is_rollout.any():
            metrics |= _compare_with_rollout(data, log_probs.student_label, response_mask * is_rollout.unsqueeze(1))

        written = {fields.LABEL_WEIGHTS: label_weights}
        if self.uses_ratio:
            written[fields.OLD_LABEL_LOG_PROBS] = log_probs.student_label
        if self.config.objectives.weighs_sample:
            written[fields.SAMPLED_WEIGHTS] = sampled_weights
            if self.uses_ratio:
                written[fields.OLD_SAMPLED_LOG_PROBS] = log_probs.student_sampled
        batch.put({name: response_to_nested(values, nested_mask) for name, values in written.items()})
        return metrics

    def _pass_outputs(self) -> list[str]:
        names = [fields.STUDENT_LABEL_LOG_PROBS, fields.ENTROPY, fields.TEACHER_LABEL_LOG_PROBS]
        names += [fields.SAMPLED_TOKENS, fields.STUDENT_SAMPLED_LOG_PROBS, fields.TEACHER_SAMPLED_LOG_PROBS]
        return [*names, fields.ROLLOUT_LOG_PROBS] if self.compares_rollouts else names

    @property
    def update_inputs(self) -> list[str]:
        label, sampled = [fields.LABEL_WEIGHTS], [fields.SAMPLED_TOKENS, fields.SAMPLED_WEIGHTS]
        if self.uses_ratio:
            label, sampled = [*label, fields.OLD_LABEL_LOG_PROBS], [*sampled, fields.OLD_SAMPLED_LOG_PROBS]
        return label + sampled if self.config.objectives.weighs_sample else label


def _response(data: TensorDict, name: str) -> Tensor:
    """A full field's entries at response tokens, [rows, response]."""
    return response_from_nested(data[name], data["response_mask"]).to_padded_tensor(0)


def _token_log_probs(data: TensorDict) -> TokenLogProbs:
    """Both models' log-probs, [rows, response]."""
    return TokenLogProbs(
        student_label=_response(data, fields.STUDENT_LABEL_LOG_PROBS),
        teacher_label=_response(data, fields.TEACHER_LABEL_LOG_PROBS),
        student_sampled=_response(data, fields.STUDENT_SAMPLED_LOG_PROBS),
        teacher_sampled=_response(data, fields.TEACHER_SAMPLED_LOG_PROBS),
        sampled_is_label=_response(data, fields.SAMPLED_TOKENS) == data["responses"].to_padded_tensor(0),
    )


def _refuse_nan(batch: Batch, log_probs: TokenLogProbs) -> None:
    """Stop before an update that NaN logits would spoil."""
    for model, names in (
        ("student", ("student_label", "student_sampled")),
        ("teacher", ("teacher_label", "teacher_sampled")),
    ):
        bad = torch.stack([getattr(log_probs, name).isnan() for name in names]).any(0).any(1)
        if bad.any():
            rows = [batch.row_name(index) for index in bad.nonzero().flatten().tolist()]
            raise FloatingPointError(
                f"step {batch.step}: NaN in the {model}'s logits, in {len(rows)} of {len(bad)} rows of the batch "
                f"(rows {', '.join(rows[:8])}); stopped before the update, checkpoints are untouched"
            )


def _compare_with_rollout(data: TensorDict, student_label: Tensor, rollout_mask: Tensor) -> dict[str, float]:
    """Compare the rollout server's log-probs with the student's, on rollouts; verl compares probabilities."""
    rollout = data[fields.ROLLOUT_LOG_PROBS].to_padded_tensor(0)
    compared = TensorDict(
        {
            "old_log_probs": student_label,
            "rollout_log_probs": rollout,
            "response_mask": rollout_mask,
            "responses": data["responses"].to_padded_tensor(0),
        },
        batch_size=len(student_label),
    )
    difference = (rollout - student_label)[rollout_mask.bool()].double().abs().mean().item()
    return {ROLLOUT_DIFFERENCE: difference} | calculate_debug_metrics(DataProto(batch=compared))


class Staged(RankPipeline):
    """Student and teacher of one rank, each with the loss function of its passes."""

    def __init__(self, student: TrainingWorker, teacher: TeacherWorker, config: HPDConfig, actor: ActorConfig) -> None:
        self.student = student
        self.loss_agg_mode = actor.loss_agg_mode
        student.set_loss_fn(StudentLoss(actor, config))
        vocabulary_size = shared_vocabulary_size(student.model_config, teacher.model_config)
        teacher.set_loss_fn(TeacherLogProbs(config, vocabulary_size))

    @classmethod
    def of_workers(
        cls, student: TrainingWorker, teacher: TeacherWorker, config: HPDConfig, actor: ActorConfig
    ) -> "Staged":
        return cls(student, teacher, config, actor)

    def update(self, data: TensorDict) -> TensorDict | None:
        return train(self.student, data, self.loss_agg_mode)


class StagedStudentWorker(TrainingWorker):
    """verl's worker of the actor, with the engine that keeps rows apart."""

    def __init__(self, config: TrainingWorkerConfig) -> None:
        super().__init__(dataclasses.replace(config, model_type=ROWS_MODEL_TYPE))


STAGED = Pipeline(StagedDriver, Staged, student_worker=StagedStudentWorker, teacher=TeacherWorker)
