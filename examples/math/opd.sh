#!/usr/bin/env bash
# On-policy distillation of a student trained by hpd.sh: the paper's second stage.
#
#   bash examples/math/hpd.sh
#   STUDENT=checkpoints/hpd_math/Qwen2.5-1.5B_from_.../global_step_2000/actor/huggingface bash examples/math/opd.sh
#
# Variables, pairs and data: hpd.sh. From the paper: 64 prompts x 4 rollouts a step. Ours: 200 steps, learning
# rate 5e-6, rollouts at temperature 1.
# Hardware: 8 GPUs of 80 GB assumed. By the planner: 46 GiB a GPU, 1.0 h (docs/recipes.md).
# Expected, the paper's averages (see hpd.sh), Qwen2.5 7B -> 1.5B: HPD 30.24, then 33.41; SFT 22.80, then 29.56.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

ROLLOUTS=${ROLLOUTS:-4} # a prompt
export BATCH_SIZE=${BATCH_SIZE:-64}
export STEPS=${STEPS:-200}
export LR=${LR:-5e-6}
export SAVE_FREQ=${SAVE_FREQ:-50} TEST_FREQ=${TEST_FREQ:-50}
export STUDENT=${STUDENT:-checkpoints/hpd_math/Qwen2.5-1.5B_from_Qwen2.5-7B-PSFT-RL-DAPO-90/global_step_2000/actor/huggingface}
export OUT_DIR=${OUT_DIR:-checkpoints/hpd_math/opd}

ON_POLICY=(
    algorithm.hpd.objective=opd
    algorithm.hpd.on_policy_fraction=1
    actor_rollout_ref.rollout.n="$ROLLOUTS"
    actor_rollout_ref.rollout.temperature=1.0
)

exec bash "$(dirname "${BASH_SOURCE[0]}")/hpd.sh" "${ON_POLICY[@]}" "$@"
