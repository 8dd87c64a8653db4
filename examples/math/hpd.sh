#!/usr/bin/env bash
# The paper's maths setting: Qwen2.5 7B teaches Qwen2.5-1.5B on long worked answers.
#
#   PAIR=qwen2.5-1.5b TRAIN_FILE=~/data/openr1_math/train.parquet VAL_FILE=~/data/math500/test.parquet \
#       bash examples/math/hpd.sh [key=value ...]
#
# Pairs: qwen2.5-1.5b, qwen2.5-3b, llama3-1b; or your own STUDENT and TEACHER.
# Teacher of the Qwen2.5 pairs: wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90, which the authors trained on the same data and
# refined by GRPO (their average: 52.74). The scores below need this teacher. The Llama 3 teacher is the Instruct model,
# because the authors' is not published to our knowledge; expect another score.
# Data: OpenR1-Math-8192, 40k rows (python -m data_prep.openr1_math), MATH-500 (python -m data_prep.math500).
# Settings from the paper: batch 256, about 2,000 steps, context 10,240 (split here into 2,048 + 8,192), learning rate
# 1e-4 (3B: 8e-5) with a cosine to a tenth, temperature 1. Ours: the Llama student's learning rate, validation.
# Hardware: 8 GPUs of 80 GB assumed. By the planner, answers of 4,000 tokens on average: 1.5B 15 GiB a GPU, 5.3 h; 3B
# 19 GiB a GPU, 7.8 h; Llama 14 GiB a GPU, 5.0 h (docs/recipes.md).
# Expected, the paper's average over AIME24, AIME25, AMC, MATH, Olympiad and GPQA: 1.5B base 18.46, SFT 22.80,
# SeqKD 26.27, RKLD 26.15, JSD 26.43, HPD 30.24; 3B: SFT 32.67, JSD 36.61, HPD 39.83; Llama 1B: SFT 13.88, HPD 18.01.
# Evaluated at temperature 0.7, top-p 0.95, avg@32 for AIME and AMC, avg@8 for the others.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

PAIR=${PAIR:-qwen2.5-1.5b}
case $PAIR in # student, teacher, learning rate
    qwen2.5-1.5b) pair=(Qwen/Qwen2.5-1.5B wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90 1e-4) ;;
    qwen2.5-3b) pair=(Qwen/Qwen2.5-3B wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90 8e-5) ;;
    llama3-1b) pair=(meta-llama/Llama-3.2-1B-Instruct meta-llama/Llama-3.1-8B-Instruct 1e-4) ;;
    *) echo "Error: PAIR=$PAIR: choose qwen2.5-1.5b, qwen2.5-3b or llama3-1b" >&2 && exit 2 ;;
esac
STUDENT=${STUDENT:-${pair[0]}}
TEACHER=${TEACHER:-${pair[1]}}
LR=${LR:-${pair[2]}}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/openr1_math/train.parquet}
VAL_FILE=${VAL_FILE:-$HOME/data/math500/test.parquet}
REWARD=${REWARD:-pkg://hpd_verl.tools.rewards.maths} # of validation
NNODES=${NNODES:-1}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}
BATCH_SIZE=${BATCH_SIZE:-256}
STEPS=${STEPS:-2000}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-2048}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-8192}
MAX_TOKENS_PER_GPU=${MAX_TOKENS_PER_GPU:-16384} # of a micro-batch; memory only, at least prompt + response
SAVE_FREQ=${SAVE_FREQ:-200}
KEEP_CHECKPOINTS=${KEEP_CHECKPOINTS:-2}
TEST_FREQ=${TEST_FREQ:-200} # -1: no validation, and no rollout server
VAL_N=${VAL_N:-4}           # answers a problem
OUT_DIR=$(realpath -m "${OUT_DIR:-checkpoints/hpd_math/$(basename "$STUDENT")_from_$(basename "$TEACHER")}")
TRACKER=${TRACKER:-wandb} # or trackio
export WANDB_MODE=${WANDB_MODE:-offline} WANDB_DIR=${WANDB_DIR:-$OUT_DIR}
export VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$OUT_DIR/metrics_$(date +%Y%m%d_%H%M%S).jsonl}

DATA=(
    data.train_files="$TRAIN_FILE"
    data.val_files="$VAL_FILE"
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
    actor_rollout_ref.actor.checkpoint.save_contents='[model,optimizer,extra,hf_model]'
    actor_rollout_ref.actor.checkpoint.load_contents='[model,optimizer,extra]'
)
REF=(
    actor_rollout_ref.ref.model.path="$TEACHER"
    actor_rollout_ref.ref.strategy=fsdp2
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu="$MAX_TOKENS_PER_GPU"
)
ROLLOUT=( # a server runs for validation, and where algorithm.hpd.on_policy_fraction > 0
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$MAX_TOKENS_PER_GPU"
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5
    actor_rollout_ref.rollout.val_kwargs.n="$VAL_N"
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.temperature=0.7
    actor_rollout_ref.rollout.val_kwargs.top_p=0.95
    reward.custom_reward_function.path="$REWARD"
)
TRAINER=(
    trainer.project_name=hpd_math
    trainer.experiment_name="$(basename "$OUT_DIR")"
    trainer.default_local_dir="$OUT_DIR"
    trainer.logger="[console,file,$TRACKER]"
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$NGPUS_PER_NODE"
    trainer.total_training_steps="$STEPS"
    trainer.total_epochs=1000 # the steps decide
    trainer.save_freq="$SAVE_FREQ"
    trainer.max_actor_ckpt_to_keep="$KEEP_CHECKPOINTS"
    trainer.test_freq="$TEST_FREQ"
)
RAY=( # a Ray cluster that is there already does not know this script's environment
    "+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_MODE='$WANDB_MODE'"
    "+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_DIR='$WANDB_DIR'"
    "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH='$VERL_FILE_LOGGER_PATH'"
)

mkdir -p "$(dirname "$VERL_FILE_LOGGER_PATH")"
exec python -m verl.trainer.main_ppo algorithm=hpd \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${REF[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "${RAY[@]}" "$@"
