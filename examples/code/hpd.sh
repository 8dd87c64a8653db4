#!/usr/bin/env bash
# The paper's code setting: Qwen2.5-Coder-7B-Instruct teaches Qwen2.5-Coder-1.5B by its own answers.
#
#   PAIR=qwen2.5-coder TRAIN_FILE=~/data/wizardcoder_teacher/train.parquet VAL_FILE=~/data/mbpp/test.parquet \
#       bash examples/code/hpd.sh [key=value ...]
#
# Pairs: qwen2.5-coder, deepseek-coder; or your own STUDENT and TEACHER. The student needs a chat template;
# DeepSeek-Coder's Instruct models have one.
# Data: WizardCoder prompts (python -m data_prep.wizardcoder) answered by the teacher
# (hpd-verl generate); validation on MBPP (python -m data_prep.mbpp).
# Settings from the paper: learning rate 5e-6, 4,096 tokens (split here into 1,024 + 3,072). Ours: 3 epochs;
# batch 256 and cosine to a tenth as in the paper's maths setting.
# Hardware: 8 GPUs of 80 GB assumed. By the planner, answers of 500 tokens on average: Qwen2.5-Coder
# 14 GiB a GPU, 22 min; DeepSeek-Coder 10 GiB a GPU, 20 min (docs/recipes.md).
# Expected, the paper's EvalPlus pass rates of Qwen2.5-Coder, greedy, HumanEval / MBPP: SFT 73.8 / 67.7,
# JSD 77.4 / 74.6, HPD 79.3 / 75.4. DeepSeek-Coder: none.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

PAIR=${PAIR:-qwen2.5-coder}
case $PAIR in # student, teacher
    qwen2.5-coder) pair=(Qwen/Qwen2.5-Coder-1.5B Qwen/Qwen2.5-Coder-7B-Instruct) ;;
    deepseek-coder) pair=(deepseek-ai/deepseek-coder-1.3b-instruct deepseek-ai/deepseek-coder-6.7b-instruct) ;;
    *) echo "Error: PAIR=$PAIR: choose qwen2.5-coder or deepseek-coder" >&2 && exit 2 ;;
esac
STUDENT=${STUDENT:-${pair[0]}}
TEACHER=${TEACHER:-${pair[1]}}
LR=${LR:-5e-6}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/wizardcoder/train.parquet}
VAL_FILE=${VAL_FILE:-$HOME/data/mbpp/test.parquet}
REWARD=${REWARD:-pkg://hpd_verl.tools.rewards.code} # of validation: runs programs in a sandbox
NNODES=${NNODES:-1}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}
BATCH_SIZE=${BATCH_SIZE:-256}
EPOCHS=${EPOCHS:-3}
STEPS=${STEPS:-null} # null: the epochs decide
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-1024}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-3072}
MAX_TOKENS_PER_GPU=${MAX_TOKENS_PER_GPU:-16384} # of a micro-batch; memory only, at least prompt + response
SAVE_FREQ=${SAVE_FREQ:-100}
KEEP_CHECKPOINTS=${KEEP_CHECKPOINTS:-2}
TEST_FREQ=${TEST_FREQ:-100} # -1: no validation, and no rollout server
VAL_N=${VAL_N:-1}           # answers a problem
OUT_DIR=$(realpath -m "${OUT_DIR:-checkpoints/hpd_code/$(basename "$STUDENT")_from_$(basename "$TEACHER")}")
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
    actor_rollout_ref.rollout.val_kwargs.do_sample=false # greedy
    reward.custom_reward_function.path="$REWARD"
)
TRAINER=(
    trainer.project_name=hpd_code
    trainer.experiment_name="$(basename "$OUT_DIR")"
    trainer.default_local_dir="$OUT_DIR"
    trainer.logger="[console,file,$TRACKER]"
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$NGPUS_PER_NODE"
    trainer.total_training_steps="$STEPS"
    trainer.total_epochs="$EPOCHS"
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
