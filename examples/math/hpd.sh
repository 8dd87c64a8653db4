#!/usr/bin/env bash
# The paper's maths setting: Qwen2.5 7B teaches Qwen2.5-1.5B on long worked answers.
#
#   TRAIN_FILE=~/data/openr1_math/train.parquet bash examples/math/run_qwen2.5-1.5b_fsdp2.sh [key=value ...]
#
# Teacher: not the plain Instruct model. The paper first trains it on the same data and then refines it by GRPO; its
# authors publish it as wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90 (52.74 on average by their evaluation). The scores below are
# that teacher's students'; with TEACHER=Qwen/Qwen2.5-7B-Instruct expect others.
# Data: OpenR1-Math-8192, 40k rows, as parquet with verl's columns and `demonstration`; the system prompt asks for
# step-by-step reasoning and the final answer in \boxed{}.
# Settings from the paper: batch 256, about 2,000 steps, context 10,240 (split here into 2,048 + 8,192), learning
# rate 1e-4 with a cosine to a tenth, temperature 1. For Qwen2.5-3B: STUDENT=Qwen/Qwen2.5-3B LR=8e-5.
# Expected, the paper's average over AIME24, AIME25, AMC, MATH, Olympiad and GPQA: base 18.46, SFT 22.80,
# SeqKD 26.27, RKLD 26.15, JSD 26.43, HPD 30.24 (3B: SFT 32.67, JSD 36.61, HPD 39.83). Evaluated at temperature 0.7,
# top-p 0.95, avg@32 for AIME and AMC, avg@8 for the others.
# Not run on a GPU by us: the configuration is tested, the result is the paper's.
set -euo pipefail

STUDENT=${STUDENT:-Qwen/Qwen2.5-1.5B}
TEACHER=${TEACHER:-wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/openr1_math/train.parquet}
NNODES=${NNODES:-1}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}
BATCH_SIZE=${BATCH_SIZE:-256}
STEPS=${STEPS:-2000}
LR=${LR:-1e-4}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-2048}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-8192}
MAX_TOKENS_PER_GPU=${MAX_TOKENS_PER_GPU:-16384} # of a micro-batch; memory only, at least prompt + response

DATA=(
    data.train_files="$TRAIN_FILE"
    data.train_batch_size="$BATCH_SIZE"
    data.max_prompt_length="$MAX_PROMPT_LENGTH"
    data.max_response_length="$MAX_RESPONSE_LENGTH"
    data.filter_overlong_prompts=true
    algorithm.hpd.temperature=1.0
)
MODEL=(
    actor_rollout_ref.model.path="$STUDENT"
    actor_rollout_ref.model.enable_gradient_checkpointing=true
)
ACTOR=(
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$MAX_TOKENS_PER_GPU"
    actor_rollout_ref.actor.optim.lr="$LR"
    actor_rollout_ref.actor.optim.lr_scheduler_type=cosine
    actor_rollout_ref.actor.optim.min_lr_ratio=0.1
)
REF=(
    actor_rollout_ref.ref.model.path="$TEACHER"
    actor_rollout_ref.ref.strategy=fsdp2
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu="$MAX_TOKENS_PER_GPU"
)
ROLLOUT=( # no server runs unless algorithm.hpd.on_policy_fraction > 0 or something validates
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$MAX_TOKENS_PER_GPU"
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5
)
TRAINER=(
    trainer.project_name=hpd_math
    trainer.experiment_name="$(basename "$STUDENT")_from_$(basename "$TEACHER")"
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$NGPUS_PER_NODE"
    trainer.total_training_steps="$STEPS"
    trainer.total_epochs=1000 # the steps decide
    trainer.save_freq=200
)

python -m verl.trainer.main_ppo algorithm=hpd \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${REF[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
