"""Names of everything HPD adds to verl's batches, in one place.

A batch lives in TransferQueue, one key per sequence. "Full" fields have one entry per token of prompt and response,
where entry t belongs to the logits at t, which predict token t + 1; "response" fields have one per response token.
"""

ON_POLICY = "on_policy"
"""bool per prompt, set by the trainer before generation: the student answers this row itself."""

ROW = "row"
"""int64 [rows, 1]: number of the sequence within its batch, a counter of the student's draws."""

IS_ROLLOUT = "is_rollout"
"""int64 [rows, 1]: 1 for rollouts, 0 for demonstrations."""

IS_PADDING = "is_padding"
"""int64 [rows, 1], in validation: 1 where a row only fills the batch up and counts for nothing."""

TEACHER_PROMPTS = "teacher_prompts"
"""int64 [rows, tokens], nested: what the teacher reads in place of ``prompts``, where it reads something else."""

TEACHER = "teacher"
"""int64 [rows, 1]: which of several teachers scores the row, by its place in ``algorithm.hpd.teachers``."""

TRUNCATED = "truncated_demonstration"
"""Tag or column of a sequence: its demonstration was cut at data.max_response_length."""

REOPENED = "reopened_demonstration"
"""Tag or column of a sequence: its demonstration's opening reasoning tag is left out, since the prompt ends with it."""

TRUNCATED_PROMPT = "truncated_prompt"
"""Tag or column of a demonstration, extra field of a rollout: its prompt lost its start at data.max_prompt_length."""

TRUNCATED_TEACHER_PROMPT = "truncated_teacher_prompt"
"""Column of a sequence: the teacher's prompt lost its start at data.max_teacher_prompt_length."""

COUNTED_FLAGS = {
    TRUNCATED: "hpd/truncated_demonstrations",
    REOPENED: "hpd/reopened_demonstrations",
    TRUNCATED_PROMPT: "hpd/truncated_prompts",
    TRUNCATED_TEACHER_PROMPT: "hpd/truncated_teacher_prompts",
}
"""Flags of a sequence and the metric that counts each in a batch."""

STEP = "hpd_step"
"""int, batch-wide: the training step, a counter of the student's draws."""

FETCHED = "fetched_answers"
"""``Fetched``, batch-wide: what servers have answered to rows of this batch already."""

STEPS = "hpd_steps"
"""int, batch-wide: the number of training steps of the run."""

COMPARES_ROLLOUTS = "hpd_compares_rollouts"
"""bool, batch-wide: the rollout server's log-probs are of the student's distribution. True if it is not given."""


def row_number(name: str) -> str:
    """float32 [rows, 1]: a number of each row that objectives need, NaN where it has none; its field by its name."""
    return f"row_number_{name}"


# Student pass (full, float32 except the tokens).
STUDENT_LABEL_LOG_PROBS = "student_label_log_probs"
SAMPLED_TOKENS = "sampled_tokens"  # int64
STUDENT_SAMPLED_LOG_PROBS = "student_sampled_log_probs"
ENTROPY = "student_entropy"

# Teacher pass (full, float32).
TEACHER_LABEL_LOG_PROBS = "teacher_label_log_probs"
TEACHER_SAMPLED_LOG_PROBS = "teacher_sampled_log_probs"

# Update (response, float32): detached weights; log-probs the weights were computed with, only where a ratio is used.
LABEL_WEIGHTS = "advantages"  # verl's name, which its metrics read
OLD_LABEL_LOG_PROBS = "old_log_probs"  # verl's name
SAMPLED_WEIGHTS = "sampled_weights"
OLD_SAMPLED_LOG_PROBS = "old_sampled_log_probs"

# Of the rollout server (response, float32).
ROLLOUT_LOG_PROBS = "rollout_log_probs"  # verl's name; 0 for demonstrations

# Returned by the student in the update (full, differentiable).
LABEL_LOG_PROBS = "label_log_probs"
SAMPLED_LOG_PROBS = "sampled_log_probs"

# The fields of the sequences that a worker needs.
SEQUENCE_FIELDS = ["input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask", ROW, IS_ROLLOUT]
