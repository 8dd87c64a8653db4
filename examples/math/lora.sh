#!/usr/bin/env bash
# HPD of a LoRA adapter on one GPU: Qwen2.5-7B-Instruct teaches an adapter of Qwen2.5-1.5B-Instruct on GSM8K.
#
#   TRAIN_FILE=~/data/gsm8k_teacher/train.parquet VAL_FILE=~/data/gsm8k_teacher/test.parquet \
#       bash examples/math/lora.sh [key=value ...]
#
# Variables and data: one_gpu.sh. Only the adapter is trained. Ours: rank 64, alpha 128, all linear layers, learning
# rate 2e-4. `hpd-verl export` writes a merged model or the adapter. main_ppo has the same settings under
# actor_rollout_ref.model, and needs actor_rollout_ref.rollout.load_format=safetensors for rollouts.
# Hardware: one GPU of 24 GB assumed. By the planner: 14 GiB a GPU, 1.1 h (docs/recipes.md).
# Expected score: none. Qwen reports GSM8K 73.2 for the untrained student, 91.6 for the teacher.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

LORA_RANK=${LORA_RANK:-64}
LORA_ALPHA=${LORA_ALPHA:-128}
export STUDENT=${STUDENT:-Qwen/Qwen2.5-1.5B-Instruct}
export TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
export LR=${LR:-2e-4}
export OUT_DIR=${OUT_DIR:-checkpoints/hpd_math/lora}

LORA=(
    model.lora_rank="$LORA_RANK"
    model.lora_alpha="$LORA_ALPHA"
    model.target_modules=all-linear
)

exec bash "$(dirname "${BASH_SOURCE[0]}")/one_gpu.sh" "${LORA[@]}" "$@"
