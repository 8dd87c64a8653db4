#!/usr/bin/env bash
# HPD of a LoRA adapter: the student's own weights stay as they are.
#
#   bash examples/math/lora.sh [key=value ...]
#
# Variables, pairs, data and hardware: hpd.sh; gradients and the optimiser's states are the adapter's only. Ours: rank
# 64, alpha 128, all linear layers, learning rate 2e-4. Expected: nobody's score.
# `python -m hpd_verl.export` makes a model or an adapter folder of a checkpoint.
# Not run on a GPU by us: two steps of tiny models on a CPU are tested.
set -euo pipefail

LORA_RANK=${LORA_RANK:-64}
LORA_ALPHA=${LORA_ALPHA:-128}
export LR=${LR:-2e-4}
export OUT_DIR=${OUT_DIR:-checkpoints/hpd_math/lora}

LORA=(
    actor_rollout_ref.model.lora_rank="$LORA_RANK"
    actor_rollout_ref.model.lora_alpha="$LORA_ALPHA"
    actor_rollout_ref.model.target_modules=all-linear
    actor_rollout_ref.rollout.load_format=safetensors # the server reads the weights below the adapter itself
)

exec bash "$(dirname "${BASH_SOURCE[0]}")/hpd.sh" "${LORA[@]}" "$@"
