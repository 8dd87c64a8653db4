#!/usr/bin/env bash
# Stores the teacher's features of all rows for strong_teacher.sh. Run it first, on GPUs that hold the teacher.
#
#   bash examples/math/store_teacher.sh [key=value ...]
#
# Stored rows are skipped: the same command resumes. It ends with the number of rows and GiB. Variables:
# strong_teacher.sh; data, teacher and store must be the same there.
# Hardware: 8 GPUs of 80 GB assumed. By the planner, 40,000 answers of 6,000 tokens: 12 GiB a GPU, 21 min,
# 918 GiB on disk (docs/recipes.md).
# Tested: tiny models on a CPU; not on a GPU.
set -euo pipefail

STUDENT=${STUDENT:-Qwen/Qwen3-0.6B}
TEACHER=${TEACHER:-Qwen/Qwen3-30B-A3B}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/openr1_math_qwen3/train.parquet}
VAL_FILE=${VAL_FILE:-$HOME/data/openr1_math_qwen3/test.parquet}
STORE_DIR=$(realpath -m "${STORE_DIR:-teacher_store/$(basename "$TEACHER")}")
STORE_GIB=${STORE_GIB:-1000} # at most
NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}
BATCH_SIZE=${BATCH_SIZE:-128}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-2048}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-20480}
MAX_TOKENS_PER_GPU=${MAX_TOKENS_PER_GPU:-24576} # of a micro-batch; memory only, at least prompt + response

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
    teacher.model.path="$TEACHER"
)

exec python -m hpd_verl.run.torchrun --standalone --nproc_per_node="$NGPUS_PER_NODE" -m hpd_verl.sft.fill_store \
    "${DATA[@]}" "${STORE[@]}" "${MODEL[@]}" "$@"
