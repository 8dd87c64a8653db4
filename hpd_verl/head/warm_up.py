"""Compile what training will run before its first step, whose time is then a step's."""

from dataclasses import replace

import torch

from hpd_verl.head.distillation_head import distillation_head
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, TopKFeatures, teacher_features
from hpd_verl.head.hybrid import HybridFeatures
from hpd_verl.head.output_head import OutputHead
from hpd_verl.objectives import RowObjectives, TokenContext

_CPU_ROWS = 16
_ROWS = 512  # kernels are chosen for as many; fewer do not fill an accelerator


@torch.enable_grad()
def warm_up(
    head: OutputHead,
    teacher: TeacherFeatures | None,
    objectives: RowObjectives,
    temperature: float,
    draws: int,
    exact_kl: bool,
) -> None:
    """Run the compiled head on zeros, of hidden size 1: compiled code does not depend on the hidden size.

    Args:
        head: of the student; its weight is only looked at for rows, dtype and device.
        teacher: features of any number of tokens, as they will come; None without teacher. Where their log-sum-exp is
            known, ``teacher_features`` is compiled too.
        objectives, temperature, exact_kl: as of ``distillation_head``.
        draws: tokens to sample at each position, 1 or 0.
    """
    small = _small(head)
    device, rows = small.weight.device, _CPU_ROWS if small.weight.device.type == "cpu" else _ROWS
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    if teacher is not None:
        teacher = _zeros(teacher, rows, device)
        if isinstance(teacher, HiddenFeatures) and teacher.log_sum_exp is not None:
            teacher_features(teacher.hidden, teacher.head, labels, teacher.temperature, compiled=True)
    is_rollout = torch.arange(rows, device=device) % 2 == 0
    distillation_head(
        torch.zeros(rows, 1, dtype=small.weight.dtype, device=device, requires_grad=True),
        small,
        labels,
        torch.zeros(rows, draws, dtype=torch.float64, device=device),
        torch.ones(rows, device=device),
        is_rollout,
        teacher,
        objectives,
        temperature,
        chunk_size=rows,
        exact_kl=exact_kl,
        compiled=True,
        context=TokenContext.example(objectives.needs, is_rollout, torch.float32) if objectives.needs else None,
        row=torch.zeros_like(labels),
    )


def _small(head: OutputHead) -> OutputHead:
    """The same with zeros of hidden size 1 in place of its weight."""
    zeros = torch.zeros(head.vocabulary_size, 1, dtype=head.weight.dtype, device=head.weight.device)
    return replace(head, weight=zeros, bias=None if head.bias is None else zeros.squeeze(1))


def _zeros(features: TeacherFeatures, rows: int, device: torch.device) -> TeacherFeatures:
    """The same of other tokens, all zeros; so is what they are computed from."""
    if isinstance(features, HybridFeatures):  # the passes see of both forms log-probs only
        nothing = features.shift
        features = TopKFeatures(nothing, nothing, nothing, nothing, features.vocabulary_size, features.code.head.dtype)
    if isinstance(features, HiddenFeatures):
        features = replace(features, head=_small(features.head))
    assert isinstance(features, HiddenFeatures | TopKFeatures)
    columns = {"hidden": (1,), "top_tokens": (1,), "top_log_probs": (1,)}
    dtypes = {"top_tokens": torch.int64}
    return features.with_tensors(
        {
            name: torch.zeros(rows, *columns.get(name, ()), dtype=dtypes.get(name, torch.float32), device=device)
            for name in features.tensors
        }
    )
