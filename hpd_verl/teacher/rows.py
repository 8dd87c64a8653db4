"""The step in front of any teacher: from the student's rows to those that the teacher reads."""

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from hpd_verl.data import fields


def teacher_rows(data: TensorDict) -> TensorDict:
    """The rows with the teacher's prompts in place of the student's, and the same response tokens.

    Args:
        data: ``fields.SEQUENCE_FIELDS`` and, where the teacher reads something else, ``fields.TEACHER_PROMPTS``.

    Returns:
        ``data`` itself where the teacher reads what the student reads; else a batch of its own, with the same settings.
    """
    if fields.TEACHER_PROMPTS not in data:
        return data
    prompts, responses = data[fields.TEACHER_PROMPTS].unbind(), data["responses"].unbind()
    ids = [torch.cat([prompt, response]) for prompt, response in zip(prompts, responses, strict=True)]
    rows = data.exclude(fields.TEACHER_PROMPTS)
    rows["prompts"] = tu.nested_tensor_from_tensor_list(list(prompts))
    rows["input_ids"] = tu.nested_tensor_from_tensor_list(ids)
    rows["position_ids"] = tu.nested_tensor_from_tensor_list([torch.arange(len(row), device=row.device) for row in ids])
    return rows
