"""The student's loss in one pass: sampled tokens, weights, loss and gradients inside the output layer."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.response_tokens import ResponseTokens, column, response_tokens, row_numbers
from hpd_verl.engine.head_engine import MODEL_TYPE, HeadLoss
from hpd_verl.engine.sequence_parallel import SequenceGroup
from hpd_verl.head.distillation_head import HeadOutput, distillation_head
from hpd_verl.head.features import TeacherFeatures
from hpd_verl.head.metrics import token_metrics
from hpd_verl.head.output_head import OutputHead
from hpd_verl.head.sampling import counter_uniform
from hpd_verl.head.warm_up import warm_up
from hpd_verl.objectives import TokenContext, TokenLogProbs
from hpd_verl.objectives.context import IS_ROLLOUT, ROW
from hpd_verl.pipelines.pipeline import Driver, Pipeline, RankPipeline
from hpd_verl.pipelines.updates import RESPONSE_TOKENS, ROLLOUT_DIFFERENCE, ROLLOUT_TOKENS, of_each_teacher, train
from hpd_verl.teacher.choice import make_teacher
from hpd_verl.teacher.rows import teacher_rows
from hpd_verl.teacher.settings import TeacherSettings
from hpd_verl.teacher.several import SeveralTeachers
from hpd_verl.teacher.teacher import Teacher


class OnePassLoss(HeadLoss):
    """verl's loss function of the student.

    Args:
        config: the algorithm's configuration.
        loss_agg_mode: verl's aggregation of token losses.
        loss_scale_factor: verl's setting of that name.
        compiled: fuse the output layer's elementwise work by ``torch.compile``.
    """

    def __init__(
        self, config: HPDConfig, loss_agg_mode: str, loss_scale_factor: int | None, compiled: bool = False
    ) -> None:
        self.config = config
        self.loss_agg_mode = loss_agg_mode
        self.loss_scale_factor = loss_scale_factor
        self.compiled = compiled
        self.teacher_features: dict[int, TeacherFeatures] = {}
        """Features of the current batch, by row number; under Ulysses of the rows that this rank owns."""
        self.owners: dict[int, int] = {}
        """Under Ulysses, the rank of the group that has a row's features, by row number."""
        self.templates: dict[int, TeacherFeatures] = {}
        """Under Ulysses, features of no tokens, by the place of their teacher among several; 0 for a single one."""

    def from_hidden(self, hidden: Tensor, head: OutputHead, data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        sharing = SequenceGroup.current()
        whole = response_tokens(data)
        parts = sharing.parts(whole, len(hidden))
        responses = parts[sharing.rank]
        rows = row_numbers(data)
        hidden, uniforms = responses.take(hidden), self._uniforms(responses, rows, data)
        token_scale = self._token_scale(data)[responses.place]
        is_rollout = column(data, fields.IS_ROLLOUT).bool()[responses.row]
        context = self._context(whole, responses, data)
        shares = self._shares(rows, parts, sharing, data)
        outputs = [
            distillation_head(
                hidden=hidden[tokens],
                head=head,
                labels=responses.labels[tokens],
                uniforms=uniforms[tokens],
                token_scale=token_scale[tokens],
                is_rollout=is_rollout[tokens],
                teacher=teacher,
                objectives=self.config.objectives,
                temperature=self.config.temperature,
                chunk_size=self.config.token_chunk_size,
                exact_kl=self.config.exact_kl_metrics,
                compiled=self.compiled,
                context=None if context is None else context.at(tokens),
                row=responses.row[tokens],
            )
            for tokens, teacher in shares
        ]
        output = outputs[0] if len(outputs) == 1 else _joined(outputs, [tokens for tokens, _ in shares])
        self._refuse_nan(output, responses, rows, data, sharing)
        return output.loss, self._metrics(output, responses, data)

    def _context(self, whole: ResponseTokens, responses: ResponseTokens, data: TensorDict) -> TokenContext | None:
        """What the objectives need of this rank's response tokens, of those of the micro-batch."""
        needs = self.config.objectives.needs
        if not needs:
            return None
        row, device = responses.row, responses.labels.device
        found = TokenContext()
        if "step" in needs:
            step, steps = (
                torch.full(row.shape, float(tu.get_non_tensor_data(data=data, key=key, default=None)), device=device)
                for key in (fields.STEP, fields.STEPS)
            )
            found = found._replace(step=step, steps=steps)
        if "position" in needs:
            found = found._replace(position=whole.index[responses.place], length=whole.lengths[row])
        numbers = {name: column(data, fields.row_number(name)) for name in self.config.row_numbers}
        if ROW + IS_ROLLOUT in needs:
            numbers[IS_ROLLOUT] = column(data, fields.IS_ROLLOUT)
        found = found._replace(row={name: values.float()[row] for name, values in numbers.items()})
        if "behaviour" in needs:
            is_rollout = column(data, fields.IS_ROLLOUT).bool()[row]
            # Without a rollout server nothing has such log-probs.
            log_probs = torch.full(row.shape, torch.nan, device=device)
            if fields.ROLLOUT_LOG_PROBS in data:
                log_probs = self._rollout_log_probs(responses, data)
            found = found._replace(behaviour=torch.where(is_rollout, log_probs, torch.nan))
        return found

    def _shares(
        self, rows: Tensor, parts: list[ResponseTokens], sharing: SequenceGroup, data: TensorDict
    ) -> list[tuple[slice | Tensor, TeacherFeatures | None]]:
        """This rank's response tokens, each once, with their teacher's features: all of them, or those of each teacher.

        Sampled tokens depend on row and position alone, so the gradients of the shares add up to those of one batch.
        """
        if not self.config.needs_teacher:
            return [(slice(None), None)]
        if fields.TEACHER not in data:
            return [(slice(None), self._teacher(rows.tolist(), 0, parts, sharing))]
        of_row = column(data, fields.TEACHER).to(rows.device)
        found = of_row.unique().tolist()
        shares: list[tuple[slice | Tensor, TeacherFeatures | None]] = []
        for teacher in found:
            own = [each.where(of_row[each.row] == teacher) for each in parts]
            is_own = of_row[parts[sharing.rank].row] == teacher
            numbers = torch.where(of_row == teacher, rows, -1).tolist()
            tokens = slice(None) if len(found) == 1 else is_own.nonzero().squeeze(1)
            shares.append((tokens, self._teacher(numbers, teacher, own, sharing)))
        return shares

    def _teacher(
        self, rows: list[int], place: int, parts: list[ResponseTokens], sharing: SequenceGroup
    ) -> TeacherFeatures:
        """Features of this rank's part of rows.

        Args:
            rows: numbers of the micro-batch's rows; -1 where another teacher has the row.
            place: of the teacher among several.
            parts: response tokens of each rank's part, of this teacher's rows.
            sharing: the ranks that share the rows.
        """
        if sharing.size == 1:
            return TeacherFeatures.cat([self.teacher_features[row] for row in rows if row >= 0])
        whole = [self.teacher_features.get(row) for row in rows]
        return sharing.to_parts(whole, self.templates[place], parts, [self.owners.get(row, 0) for row in rows])

    def _uniforms(self, responses: ResponseTokens, rows: Tensor, data: TensorDict) -> Tensor:
        """The numbers that the student's tokens are sampled with, float64 [n, 1]; [n, 0] without a teacher."""
        step = tu.get_non_tensor_data(data=data, key=fields.STEP, default=None)
        positions = data["position_ids"].values()[responses.positions]
        uniforms = counter_uniform(self.config.seed, step, rows[responses.row], positions).unsqueeze(1)
        return uniforms if self.config.needs_teacher else uniforms[:, :0]

    def _token_scale(self, data: TensorDict) -> Tensor:
        """Factor of each token's loss in the global loss [n]: verl's aggregation, which is linear in the losses."""
        mask = data["response_mask"].to_padded_tensor(0).bool()
        with torch.enable_grad():
            losses = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
            total = agg_loss(
                loss_mat=losses,
                loss_mask=mask,
                loss_agg_mode=self.loss_agg_mode,
                dp_size=data["dp_size"],
                batch_num_tokens=data["batch_num_tokens"],
                global_batch_size=data["global_batch_size"],
                loss_scale_factor=self.loss_scale_factor,
            )
            (scale,) = torch.autograd.grad(total, losses)
        return scale[mask]

    def _refuse_nan(
        self,
        output: HeadOutput,
        responses: ResponseTokens,
        rows: Tensor,
        data: TensorDict,
        sharing: SequenceGroup,
    ) -> None:
        checked = {"student": output.label_log_probs}
        if output.teacher_label_log_probs is not None:
            checked["teacher"] = output.teacher_label_log_probs
        for model, log_probs in checked.items():
            broken = torch.zeros(len(rows), dtype=torch.bool, device=log_probs.device)
            broken[responses.row[torch.isnan(log_probs)]] = True
            broken = sharing.any_of(broken)
            if broken.any():
                step = tu.get_non_tensor_data(data=data, key=fields.STEP, default=None)
                numbers = rows[broken].sort().values.tolist()
                raise FloatingPointError(
                    f"step {step}: NaN in the {model}'s logits, in {len(numbers)} of {len(rows)} rows of the "
                    f"micro-batch (rows {', '.join(map(str, numbers[:8]))}); stopped before the update, checkpoints "
                    "are untouched"
                )

    def _metrics(self, output: HeadOutput, responses: ResponseTokens, data: TensorDict) -> dict[str, Any]:
        """Sums over this micro-batch, which verl adds up over micro-batches and averages over ranks."""
        per_token = {"hpd/student_nll": -output.label_log_probs}
        if output.teacher_label_log_probs is not None and output.teacher_sampled_log_probs is not None:
            log_probs = TokenLogProbs(
                student_label=output.label_log_probs,
                teacher_label=output.teacher_label_log_probs,
                student_sampled=output.sampled_log_probs.squeeze(1),
                teacher_sampled=output.teacher_sampled_log_probs.squeeze(1),
                sampled_is_label=output.sampled.squeeze(1) == responses.labels,
            )
            weights = output.sampled_weights.squeeze(1)
            per_token = token_metrics(log_probs, output.label_weights, weights, output.entropy)
        if output.forward_kl is not None and output.reverse_kl is not None:
            per_token |= {"hpd/forward_kl": output.forward_kl, "hpd/reverse_kl": output.reverse_kl}
        if fields.TEACHER in data and self.config.teachers is not None:
            of_token = column(data, fields.TEACHER).to(responses.row.device)[responses.row]
            per_token |= of_each_teacher(per_token, of_token, list(self.config.teachers))
        share = data["dp_size"] / data["batch_num_tokens"]
        sums = {name: values.double().sum() * share for name, values in per_token.items()}
        sums[RESPONSE_TOKENS] = torch.tensor(float(len(responses.labels) * data["dp_size"]))
        compares = tu.get_non_tensor_data(data=data, key=fields.COMPARES_ROLLOUTS, default=True)
        if fields.ROLLOUT_LOG_PROBS in data and compares:
            sums |= self._compare_with_rollout(output.label_log_probs, responses, data)
        sums["hpd/loss"] = output.loss.detach()
        return {name: Metric(AggregationType.SUM, value) for name, value in sums.items()}

    @staticmethod
    def _rollout_log_probs(responses: ResponseTokens, data: TensorDict) -> Tensor:
        log_probs: Tensor = data[fields.ROLLOUT_LOG_PROBS].values()
        return log_probs[data["response_mask"].values().bool()][responses.place]

    def _compare_with_rollout(self, student: Tensor, responses: ResponseTokens, data: TensorDict) -> dict[str, Tensor]:
        """Sums over the rollouts' tokens: of how far the rollout server's log-probs are off, and of the tokens."""
        rollout = self._rollout_log_probs(responses, data)
        is_rollout = column(data, fields.IS_ROLLOUT).bool()[responses.row]
        difference = (rollout - student.detach())[is_rollout].double().abs().sum()
        return {
            ROLLOUT_DIFFERENCE: difference * data["dp_size"],
            ROLLOUT_TOKENS: is_rollout.sum() * data["dp_size"],
        }


def _joined(parts: Sequence[HeadOutput], tokens: Sequence[slice | Tensor]) -> HeadOutput:
    """The output for all tokens from that for parts of them, which ``tokens`` names."""
    order = torch.cat([each for each in tokens if isinstance(each, Tensor)]).argsort()
    joined: dict[str, Any] = {"loss": torch.stack([part.loss for part in parts]).sum()}
    for field in dataclasses.fields(HeadOutput):
        values = [getattr(part, field.name) for part in parts]
        if field.name != "loss":
            joined[field.name] = None if any(value is None for value in values) else torch.cat(values)[order]
    return HeadOutput(**joined)


class StudentWorker(TrainingWorker):
    """verl's worker of the actor, with the engine that hands hidden states to the loss."""

    def __init__(self, config: TrainingWorkerConfig) -> None:
        super().__init__(dataclasses.replace(config, model_type=MODEL_TYPE))

    def reset(self) -> None:
        """verl's call to load the model.

        Raises:
            ValueError: its output layer is not understood.
        """
        super().reset()
        self.engine.use_head()


class OnePassDriver(Driver):
    """The update does everything, with the rollout server's log-probs if they are compared or an objective needs them,
    and the numbers of rows that objectives need."""

    @property
    def update_inputs(self) -> list[str]:
        reads_rollouts = self.compares_rollouts or "behaviour" in self.config.objectives.needs
        log_probs = [fields.ROLLOUT_LOG_PROBS] if reads_rollouts else []
        return [*log_probs, *map(fields.row_number, self.config.row_numbers)]


class OnePass(RankPipeline):
    """Student and teacher of one rank: the teacher's features, then one pass of the student.

    Args:
        student: the student's worker, its model loaded.
        teacher: None where no objective or metric needs one.
        config: the algorithm's configuration.
        loss_agg_mode, loss_scale_factor: verl's settings of those names.
    """

    def __init__(
        self,
        student: StudentWorker,
        teacher: Teacher | None,
        config: HPDConfig,
        loss_agg_mode: str = "token-mean",
        loss_scale_factor: int | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.following: TensorDict | None = None
        """The rows of the next update, if they are known: the teacher may fetch their features during this one."""
        self.loss = OnePassLoss(config, loss_agg_mode, loss_scale_factor, self.student.engine.compiles)
        self.student.set_loss_fn(self.loss)
        if self.loss.compiled:
            self._warm_up(config)

    def _warm_up(self, config: HPDConfig) -> None:
        """Compile what the output layer runs; what it needs of a teacher that is not known yet, the first step does."""
        forms: list[TeacherFeatures | None] = [None]
        if self.teacher is not None:
            forms = [form for each in self._teachers() if (form := each.known_form()) is not None]
        run = (config.objectives, config.temperature, int(config.needs_teacher), config.exact_kl_metrics)
        for form in forms:
            self.student.engine.warm_up(lambda head, form=form: warm_up(head, form, *run))

    def _teachers(self) -> list[Teacher]:
        """In the order of ``fields.TEACHER``."""
        assert self.teacher is not None
        return list(self.teacher.teachers.values()) if isinstance(self.teacher, SeveralTeachers) else [self.teacher]

    @classmethod
    def of_workers(
        cls, student: TrainingWorker, teacher: TeacherSettings, config: HPDConfig, actor: ActorConfig
    ) -> "OnePass":
        made = make_teacher(teacher, config, student.model_config, student) if config.needs_teacher else None
        return cls(student, made, config, actor.loss_agg_mode, actor.loss_scale_factor)

    def update(self, data: TensorDict) -> TensorDict | None:
        """The student's updates, with the teacher's metrics added."""
        metrics = self._take_teacher_features(data)
        data = data.exclude(fields.FETCHED)
        if self.following is not None and self.teacher is not None:
            self.teacher.announce(teacher_rows(self.following))
            self.following = None
        start = time.perf_counter()
        output = train(self.student, data, self.loss.loss_agg_mode)
        if self.teacher is not None:
            self.teacher.follow()
        return self._with_metrics(output, metrics | {"timing_s/student": time.perf_counter() - start})

    def evaluate(self, data: TensorDict) -> TensorDict | None:
        """verl's ``infer_batch`` of the student: the same loss and metrics, no gradients.

        Rows of ``fields.IS_PADDING`` take part, since ranks run the models together, and count for nothing.
        """
        metrics = self._take_teacher_features(data)
        if fields.IS_PADDING in data:
            self._mask_padding(data)
        return self._with_metrics(self.student.infer_batch(data=data), metrics)

    def _mask_padding(self, data: TensorDict) -> None:
        """Take the response tokens of padding rows out of the masks and out of the teacher's features."""
        is_padding = column(data, fields.IS_PADDING).bool()
        for name in ("response_mask", "loss_mask"):
            lengths = data[name].offsets().diff()
            kept = data[name].values() * ~is_padding.repeat_interleave(lengths)
            data[name] = torch.nested.nested_tensor_from_jagged(kept, data[name].offsets())
        for row in row_numbers(data)[is_padding].tolist():
            if row in self.loss.teacher_features:
                self.loss.teacher_features[row] = self.loss.teacher_features[row][:0]

    def _take_teacher_features(self, data: TensorDict) -> dict[str, float]:
        if self.teacher is None:
            return {}
        start = time.perf_counter()
        sharing = SequenceGroup.of(self.student.engine.ulysses_parallel_group)
        rows = teacher_rows(data)
        self.loss.teacher_features = self.teacher.features(rows, sharing.owned(len(rows)))
        if sharing.size > 1:
            self.loss.owners = {row: index % sharing.size for index, row in enumerate(row_numbers(data).tolist())}
            self.loss.templates = self._templates(data, sharing)
        return {"timing_s/teacher": time.perf_counter() - start} | self.teacher.metrics()

    def _templates(self, data: TensorDict, sharing: SequenceGroup) -> dict[int, TeacherFeatures]:
        """Of each teacher that has rows here; all ranks of the group together, whose rows are the same."""
        numbers, teachers = row_numbers(data).tolist(), self._teachers()
        of_row = column(data, fields.TEACHER).tolist() if fields.TEACHER in data else [0] * len(numbers)
        found = {}
        for place in sorted(set(of_row)):
            own = {row for row, of in zip(numbers, of_row, strict=True) if of == place}
            features = {row: each for row, each in self.loss.teacher_features.items() if row in own}
            template = teachers[place].known_form()
            assert template is not None
            found[place] = sharing.common_template(features, template)
        return found

    def _with_metrics(self, output: TensorDict | None, metrics: dict[str, float]) -> TensorDict | None:
        self.loss.teacher_features = {}
        if output is None:  # verl collects from another rank
            return None
        tu.assign_non_tensor(output, metrics=tu.get(output, "metrics") | metrics)
        return output.cpu()


ONE_PASS = Pipeline(OnePassDriver, OnePass, student_worker=StudentWorker, teacher=TeacherSettings)
