"""The metrics of the log, each a mean over the response tokens of the global batch."""

from torch import Tensor

from hpd_verl.objectives import TokenLogProbs, gap, log_ratio


def token_metrics(
    log_probs: TokenLogProbs, label_weights: Tensor, sampled_weights: Tensor, entropy: Tensor
) -> dict[str, Tensor]:
    """The value of each metric at each token.

    Args:
        log_probs: tensors of any one shape.
        label_weights, sampled_weights, entropy: of that shape.

    Returns:
        Metric name to values, of that shape. ``forward_fraction`` counts labels with gap >= 0, ``reinforced_fraction``
        labels with gap > 0 whose sampled token has gap < 0, ``suppressed_fraction`` sampled tokens of negative weight;
        ``reverse_kl_k1`` is the one-sample estimate of KL(student || teacher).
    """

    label_ratio = log_ratio(log_probs.student_label, log_probs.teacher_label)
    sampled_ratio = log_ratio(log_probs.student_sampled, log_probs.teacher_sampled)
    return {
        "hpd/label_weight_mean": label_weights,
        "hpd/sampled_weight_mean": sampled_weights,
        "hpd/label_gap_mean": gap(log_probs.student_label, log_probs.teacher_label),
        "hpd/forward_fraction": label_ratio >= 0,
        "hpd/reinforced_fraction": (label_ratio > 0) & (sampled_ratio < 0),
        "hpd/suppressed_fraction": sampled_weights < 0,
        "hpd/sampled_equals_label_fraction": log_probs.sampled_is_label,
        "hpd/reverse_kl_k1": log_probs.student_sampled - log_probs.teacher_sampled,
        "hpd/teacher_nll": -log_probs.teacher_label,
        "hpd/student_nll": -log_probs.student_label,
        "actor/entropy": entropy,
    }
