#!/usr/bin/env bash
# A stronger teacher: Qwen3-30B-A3B teaches Qwen3-0.6B with reasoning of 20k tokens. The teacher's features are stored
# first, so teacher and student never share memory.
#
#   bash examples/math/store_teacher.sh    # on GPUs that hold the teacher
#   bash examples/math/strong_teacher.sh   # on any others that see STORE_DIR; the teacher is not loaded
#
# Both take the same variables and need the teacher's folder, which identifies the store.
# Data: OpenR1-Math's problems (python -m data_prep.openr1_math) answered by the teacher
# (hpd-verl generate). A token's features take 2 x 2,048 + 8 bytes.
# Validation: loss and KL to the teacher on held-out answers (val/hpd/...).
# All settings are ours. Hardware: 8 GPUs of 80 GB assumed. By the planner, 40,000 answers of 6,000 tokens:
# 11 GiB a GPU, 28 min, and the store 918 GiB on disk (docs/recipes.md).
# Expected score: none.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

STUDENT=${STUDENT:-Qwen/Qwen3-0.6B}
TEACHER=${TEACHER:-Qwen/Qwen3-30B-A3B}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/openr1_math_qwen3/train.parquet}
VAL_FILE=${VAL_FILE:-$HOME/data/openr1_math_qwen3/test.parquet}
STORE_DIR=$(realpath -m "${STORE_DIR:-teacher_store/$(basename "$TEACHER")}")
STORE_GIB=${STORE_GIB:-1000} # at most
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}
BATCH_SIZE=${BATCH_SIZE:-128}
EPOCHS=${EPOCHS:-3}
STEPS=${STEPS:-null} # null: the epochs decide
LR=${LR:-1e-5}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-2048}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-20480}
MAX_TOKENS_PER_GPU=${MAX_TOKENS_PER_GPU:-24576} # of a micro-batch; memory only, at least prompt + response
SAVE_FREQ=${SAVE_FREQ:-100}
KEEP_CHECKPOINTS=${KEEP_CHECKPOINTS:-2}
TEST_FREQ=${TEST_FREQ:-100}
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
    data.max_token_len_per_gpu="$MAX_TOKENS_PER_GPU"
    algorithm.hpd.temperature=1.0
)
STORE=(
    algorithm.hpd.teacher_cache_dir="$STORE_DIR"
    algorithm.hpd.teacher_cache_max_gib="$STORE_GIB"
)
MODEL=(
    model.path="$STUDENT"
    model.enable_gradient_checkpointing=true
    teacher.model.path="$TEACHER"
)
OPTIM=(
    optim.lr="$LR"
    optim.lr_scheduler_type=cosine
    optim.min_lr_ratio=0.1
)
TRAINER=(
    checkpoint.save_contents='[model,optimizer,extra,hf_model]'
    checkpoint.load_contents='[model,optimizer,extra]'
    trainer.project_name=hpd_math
    trainer.experiment_name="$(basename "$OUT_DIR")"
    trainer.default_local_dir="$OUT_DIR"
    trainer.logger="[console,file,$TRACKER]"
    trainer.total_training_steps="$STEPS"
    trainer.total_epochs="$EPOCHS"
    trainer.save_freq="$SAVE_FREQ"
    trainer.max_ckpt_to_keep="$KEEP_CHECKPOINTS"
    trainer.test_freq="$TEST_FREQ"
)

mkdir -p "$(dirname "$VERL_FILE_LOGGER_PATH")"
exec python -m hpd_verl.run.torchrun --standalone --nproc_per_node="$NGPUS_PER_NODE" -m hpd_verl.sft.trainer \
    algorithm.hpd.teacher_cache=disk "${DATA[@]}" "${STORE[@]}" "${MODEL[@]}" "${OPTIM[@]}" "${TRAINER[@]}" "$@"
