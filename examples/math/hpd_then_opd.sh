#!/usr/bin/env bash
# HPD, then on-policy distillation, in one run: a growing share of each batch is rollouts.
#
#   bash examples/math/hpd_then_opd.sh [key=value ...]
#
# Variables, pairs and data: hpd.sh. The share of rollouts grows from 0 to 1 over MIX_STEPS steps and stays 1 until
# STEPS. Demonstrations train with objective hpd, rollouts with opd. A step has 256 sequences; with rollouts only, the
# paper's 64 prompts x 4 rollouts. hpd.sh and then opd.sh do the same in two runs.
# Hardware: 8 GPUs of 80 GB assumed. By the planner: 46 GiB a GPU, 10.0 h (docs/recipes.md).
# Expected score: none for one run. The paper's two separate stages: HPD 30.24, then 33.41 (after SFT 29.56).
# Ours: the schedule; learning rate 1e-5, between those of the two stages.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

MIX_STEPS=${MIX_STEPS:-2000}
ROLLOUTS=${ROLLOUTS:-4} # a prompt
export STEPS=${STEPS:-2400}
export LR=${LR:-1e-5}
export OUT_DIR=${OUT_DIR:-checkpoints/hpd_math/hpd_then_opd}

ON_POLICY=(
    algorithm.hpd.on_policy_fraction="{start: 0, end: 1, steps: $MIX_STEPS}"
    algorithm.hpd.on_policy_objective=opd
    algorithm.hpd.rollouts_per_prompt="$ROLLOUTS"
)

exec bash "$(dirname "${BASH_SOURCE[0]}")/hpd.sh" "${ON_POLICY[@]}" "$@"
