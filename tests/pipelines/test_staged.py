"""The loss functions of the staged pipeline's student and teacher, from logits."""

import torch
from verl.utils import tensordict_utils as tu

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.objectives import LOG_ZERO
from hpd_verl.pipelines.staged import TeacherLogProbs


def test_tokens_beyond_the_teachers_vocabulary_are_impossible() -> None:
    """A student may have more logits than its teacher: labels and samples there have the log-prob of zero."""
    tokens = torch.tensor([1, 2, 6, 3])
    data = tu.get_tensordict(
        {
            "input_ids": tu.nested_tensor_from_tensor_list([tokens]),
            fields.SAMPLED_TOKENS: tu.nested_tensor_from_tensor_list([torch.tensor([4, 5, 0, 7])]),
        }
    )
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
    outputs = TeacherLogProbs(HPDConfig(), vocabulary_size=5)(data, student_logits=logits)
    log_probs = torch.log_softmax(logits[0, :, :5], -1)
    label = outputs[fields.TEACHER_LABEL_LOG_PROBS].squeeze(0)
    sampled = outputs[fields.TEACHER_SAMPLED_LOG_PROBS].squeeze(0)
    torch.testing.assert_close(label[[0, 2]], log_probs[[0, 2], [2, 3]])
    torch.testing.assert_close(sampled[[0, 2]], log_probs[[0, 2], [4, 0]])
    assert label[1].item() == sampled[1].item() == sampled[3].item() == LOG_ZERO
