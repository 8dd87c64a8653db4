"""The metrics of one batch, each a mean over the response tokens of the global batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpd_verl.objectives import TokenLogProbs, gap


def batch_metrics(
    log_probs: Sequence[TokenLogProbs],
    label_weights: Tensor,
    sampled_weights: Sequence[Tensor],
    entropy: Tensor,
    response_mask: Tensor,
) -> dict[str, float]:
    """Metrics of the student and teacher passes.

    Args:
        log_probs: one entry per sample, tensors [rows, response].
        label_weights, entropy: [rows, response].
        sampled_weights: one [rows, response] per sample.
        response_mask: [rows, response].

    Returns:
        Metric name to value. ``forward_fraction`` counts labels with gap >= 0, ``reinforced_fraction`` labels with
        gap > 0 whose sample has gap < 0, ``suppressed_fraction`` samples of negative weight; ``reverse_kl_k1`` is the
        one-sample estimate of KL(student || teacher).
    """
    mask = response_mask.bool()

    def mean(values: Tensor) -> float:
        return values[mask].double().mean().item()

    def mean_over_samples(values: list[Tensor]) -> float:
        return mean(torch.stack([value.double() for value in values]).mean(0))

    first = log_probs[0]
    label_gap = gap(first.student_label, first.teacher_label)
    sampled_gaps = [gap(sample.student_sampled, sample.teacher_sampled) for sample in log_probs]
    return {
        "hpd/label_weight_mean": mean(label_weights),
        "hpd/sampled_weight_mean": mean(torch.stack(list(sampled_weights)).sum(0)),
        "hpd/label_gap_mean": mean(label_gap),
        "hpd/forward_fraction": mean(label_gap >= 0),
        "hpd/reinforced_fraction": mean_over_samples([(label_gap > 0) & (sampled < 0) for sampled in sampled_gaps]),
        "hpd/suppressed_fraction": mean_over_samples([weights < 0 for weights in sampled_weights]),
        "hpd/sampled_equals_label_fraction": mean_over_samples([sample.sampled_is_label for sample in log_probs]),
        "hpd/reverse_kl_k1": mean_over_samples(
            [sample.student_sampled - sample.teacher_sampled for sample in log_probs]
        ),
        "hpd/teacher_nll": mean(-first.teacher_label),
        "hpd/student_nll": mean(-first.student_label),
        "hpd/response_tokens": float(mask.sum().item()),
        "actor/entropy": mean(entropy),
    }
