#!/usr/bin/env bash
# Code from data set to score: MBPP's training tasks, teacher answers that pass their tests, HPD, export, evaluation on
# MBPP and HumanEval, report.
#
#   bash examples/code/pipeline.sh [key=value ...]
#
# Arguments override training settings. More variables: examples/pipeline.sh and the recipe (STEPS, BATCH_SIZE, LR,
# NGPUS_PER_NODE, ...). Programs run in a sandbox (docs/evaluation.md).
# TRAIN_SET=wizardcoder has no tests: set REWARDED=none KEEP=first.
# Hardware: one GPU of 24 GB assumed for the default pair; time and memory: docs/recipes.md.
# Expected score: none. Tested: SmolLM2 on a CPU (docs/tutorial.md); not on a GPU.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export STUDENT=${STUDENT:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
export TEACHER=${TEACHER:-Qwen/Qwen2.5-Coder-1.5B-Instruct}
export TRAIN_SET=${TRAIN_SET:-mbpp}
export TEST_SETS=${TEST_SETS:-mbpp humaneval} # with spaces between them
export RECIPE=${RECIPE:-$here/../math/one_gpu.sh}
export MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-1024}
export MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-1024}
export REWARDED=${REWARDED:-code} EVALUATION=code
export RUN_DIR=${RUN_DIR:-checkpoints/code_pipeline}

exec bash "$here/../pipeline.sh" "$@"
