#!/usr/bin/env bash
# On-policy self-distillation: the student is its own teacher, which reads the worked solution beside the problem.
#
#   TRAIN_FILE=~/data/openr1_math/train.parquet VAL_FILE=~/data/math500/test.parquet \
#       bash examples/math/self_distillation.sh [key=value ...]
#
# Variables and data: hpd.sh; the solutions are the column demonstration. The student answers every problem; the teacher
# scores the answer. TEACHER_EMA=0.99: the running average of the student teaches; 0: its current weights.
# Rows whose problem and solution exceed MAX_TEACHER_PROMPT_LENGTH are dropped.
# All settings are ours. Hardware: 8 GPUs of 80 GB assumed.
# Expected score: none.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

export TEACHER=student
export STUDENT=${STUDENT:-Qwen/Qwen2.5-1.5B-Instruct}
export BATCH_SIZE=${BATCH_SIZE:-64}
export STEPS=${STEPS:-200}
export LR=${LR:-5e-6}
export MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-1024} MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-4096}
export SAVE_FREQ=${SAVE_FREQ:-50} TEST_FREQ=${TEST_FREQ:-50}
export OUT_DIR=${OUT_DIR:-checkpoints/hpd_math/$(basename "$STUDENT")_from_itself}
MAX_TEACHER_PROMPT_LENGTH=${MAX_TEACHER_PROMPT_LENGTH:-8192}
TEACHER_EMA=${TEACHER_EMA:-null} # null: the student as it was at the start
ROLLOUTS=${ROLLOUTS:-4}          # a problem
TEMPLATE=${TEMPLATE:-"{prompt}

Here is a worked solution:

{demonstration}

Read it, then solve the problem in your own words."}

SELF=(
    data.teacher_prompt_template="'$TEMPLATE'"
    data.max_teacher_prompt_length="$MAX_TEACHER_PROMPT_LENGTH"
    algorithm.hpd.teacher_ema="$TEACHER_EMA"
    algorithm.hpd.objective=opd
    algorithm.hpd.on_policy_fraction=1
    actor_rollout_ref.rollout.n="$ROLLOUTS"
    actor_rollout_ref.rollout.temperature=1.0
)

exec bash "$(dirname "${BASH_SOURCE[0]}")/hpd.sh" "${SELF[@]}" "$@"
