#!/usr/bin/env bash
# HPD on one GPU of 24 GB: Qwen2.5-1.5B-Instruct teaches Qwen2.5-0.5B-Instruct on GSM8K, on the lean trainer.
#
#   TRAIN_FILE=~/data/gsm8k_teacher/train.parquet VAL_FILE=~/data/gsm8k_teacher/test.parquet \
#       bash examples/math/one_gpu.sh [key=value ...]
#
# Data: GSM8K (python -m data_prep.gsm8k), its problems answered by the teacher
# (hpd-verl generate). pipeline.sh does this and the evaluation in one command.
# Validation: loss and KL to the teacher on held-out answers (val/hpd/...).
# All settings are ours. By the planner, on the default pair and GSM8K: 13 GiB a GPU, 18 min (docs/recipes.md).
# Other pairs: STUDENT, TEACHER and LR. More GPUs of one machine: NGPUS_PER_NODE.
# Expected score: none. Qwen reports GSM8K 49.6 for the untrained student, 73.2 for the teacher.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

STUDENT=${STUDENT:-Qwen/Qwen2.5-0.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-1.5B-Instruct}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/gsm8k_teacher/train.parquet}
VAL_FILE=${VAL_FILE:-$HOME/data/gsm8k_teacher/test.parquet}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-1}
BATCH_SIZE=${BATCH_SIZE:-64}
EPOCHS=${EPOCHS:-3}
STEPS=${STEPS:-null} # null: the epochs decide
LR=${LR:-1e-5}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-512}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-1024}
MAX_TOKENS_PER_GPU=${MAX_TOKENS_PER_GPU:-4096} # of a micro-batch; memory only, at least prompt + response
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
    "${DATA[@]}" "${MODEL[@]}" "${OPTIM[@]}" "${TRAINER[@]}" "$@"
