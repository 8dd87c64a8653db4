#!/usr/bin/env bash
# GSM8K from data set to score: a teacher's answers, HPD, export, evaluation and report.
#
#   bash examples/math/pipeline.sh [key=value ...]
#
# Arguments override training settings. More variables: examples/pipeline.sh and the recipe (STEPS, BATCH_SIZE, LR,
# NGPUS_PER_NODE, ...). docs/tutorial.md explains each stage.
# Hardware: one GPU of 24 GB assumed for the default pair; time and memory: docs/recipes.md.
# Expected score: none. Tested: tiny models on a CPU (examples/quickstart/pipeline.sh); not on a GPU.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export STUDENT=${STUDENT:-Qwen/Qwen2.5-0.5B-Instruct}
export TEACHER=${TEACHER:-Qwen/Qwen2.5-1.5B-Instruct}
export TRAIN_SET=${TRAIN_SET:-gsm8k}
export TEST_SETS=${TEST_SETS:-gsm8k} # with spaces between them
export RECIPE=${RECIPE:-$here/one_gpu.sh}
export MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-1024}
export REWARDED=maths EVALUATION=maths
export RUN_DIR=${RUN_DIR:-checkpoints/math_pipeline}

exec bash "$here/../pipeline.sh" "$@"
