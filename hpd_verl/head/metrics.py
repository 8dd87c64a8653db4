"""The metrics of the log, each a mean over the response tokens of the global batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpd_verl.objectives import TokenLogProbs, gap, log_ratio


def token_metrics(
    log_probs: Sequence[TokenLogProbs], label_weights: Tensor, sampled_weights: Sequence[Tensor], entropy: Tensor
) -> dict[str, Tensor]:
    """The value of each metric at each token.

    Args:
        log_probs: one entry for each sampled token of a position, tensors of any one shape.
        label_weights, entropy: of that shape.
        sampled_weights: one of that shape for each sampled token.

    Returns:
        Metric name to values, of that shape. ``forward_fraction`` counts labels with gap >= 0, ``reinforced_fraction``
        labels with gap > 0 whose sampled token has gap < 0, ``suppressed_fraction`` sampled tokens of negative weight;
        ``reverse_kl_k1`` is the one-sample estimate of KL(student || teacher).
    """

    def mean_over_samples(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.double() for value in values]).mean(0)

    first = log_probs[0]
    label_ratio = log_ratio(first.student_label, first.teacher_label)
    sampled_ratios = [log_ratio(sample.student_sampled, sample.teacher_sampled) for sample in log_probs]
    return {
        "hpd/label_weight_mean": label_weights,
        "hpd/sampled_weight_mean": torch.stack(list(sampled_weights)).sum(0),
        "hpd/label_gap_mean": gap(first.student_label, first.teacher_label),
        "hpd/forward_fraction": label_ratio >= 0,
        "hpd/reinforced_fraction": mean_over_samples([(label_ratio > 0) & (sampled < 0) for sampled in sampled_ratios]),
        "hpd/suppressed_fraction": mean_over_samples([weights < 0 for weights in sampled_weights]),
        "hpd/sampled_equals_label_fraction": mean_over_samples([sample.sampled_is_label for sample in log_probs]),
        "hpd/reverse_kl_k1": mean_over_samples(
            [sample.student_sampled - sample.teacher_sampled for sample in log_probs]
        ),
        "hpd/teacher_nll": -first.teacher_label,
        "hpd/student_nll": -first.student_label,
        "actor/entropy": entropy,
    }
