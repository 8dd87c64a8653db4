#!/usr/bin/env bash
# The pipeline of examples/math with tiny models, on a CPU and without a network. The teacher first learns a small task;
# the student starts from random weights.
#
#   bash examples/quickstart/pipeline.sh
#
# Finished stages are skipped; delete RUN_DIR to start again.
set -euo pipefail

TEACHER_STEPS=${TEACHER_STEPS:-450}
export STEPS=${STEPS:-450}
TRAIN_ROWS=${TRAIN_ROWS:-2048}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RUN_DIR=$(realpath -m "${RUN_DIR:-$here/pipeline}")
export RUN_DIR
# shellcheck source=examples/check_paths.sh
source "$here/../check_paths.sh"
check_paths RUN_DIR
export VERL_PLATFORM=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
export PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH}

stage() { # NAME COMMAND...
    python "$here/../stage.py" "$RUN_DIR" "$1" -- "${@:2}"
}

# The task's rows are in verl's columns, which data_prep.openr1_math reads.
stage task python "$here/task.py" --local_save_dir "$RUN_DIR/sets/openr1_math" --train_size "$TRAIN_ROWS" \
    --sft_size 1 --val_size 1 --error_rate 0
stage teacher env STUDENT="$RUN_DIR/sets/openr1_math/teacher_init" TEACHER=null BATCH_SIZE=64 LR=3e-3 \
    TRAIN_FILE="$RUN_DIR/sets/openr1_math/train.parquet" VAL_FILE=null MAX_PROMPT_LENGTH=24 MAX_RESPONSE_LENGTH=64 \
    STEPS="$TEACHER_STEPS" SAVE_FREQ="$TEACHER_STEPS" TRACKER=console OUT_DIR="$RUN_DIR/teacher" \
    bash "$here/../math/one_gpu.sh" algorithm.hpd.objective=sft trainer.total_epochs=1000

export STUDENT=$RUN_DIR/sets/openr1_math/student_init TEACHER=$RUN_DIR/teacher/global_step_$TEACHER_STEPS/huggingface
# Words without spaces; vLLM would take most of the memory.
cpu='--dtype float32 --max_model_len 88 --engine_kwargs {"kv_cache_memory_bytes":67108864}'
export GENERATE_ARGS=$cpu EVALUATE_ARGS=$cpu
export DATA_DIR=$RUN_DIR/sets TRAIN_SET=openr1_math TEST_SETS=openr1_math PREPARE_ARGS="--test_fraction 0.06"
export BATCH_SIZE=${BATCH_SIZE:-64} LR=${LR:-3e-3} MAX_PROMPT_LENGTH=24 MAX_RESPONSE_LENGTH=64 TRACKER=console
export SAVE_FREQ=${SAVE_FREQ:-50} TEST_FREQ=${TEST_FREQ:-50} N_ANSWERS=${N_ANSWERS:-1} MIN_REWARD=${MIN_REWARD:-0}

exec bash "$here/../math/pipeline.sh" trainer.total_epochs=1000 "$@"
