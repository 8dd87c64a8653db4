#!/usr/bin/env bash
# The whole way for maths: GSM8K, a teacher's answers to its problems, HPD, export, evaluation and report.
#
#   bash examples/math/pipeline.sh [key=value ...]
#
# Arguments are overrides of the recipe's training. Variables beside those here: examples/pipeline.sh, and those of the
# recipe (STEPS, BATCH_SIZE, LR, NGPUS_PER_NODE, ...). docs/tutorial.md goes through it step by step.
# Hardware: one GPU of 24 GB assumed for the default pair; docs/recipes.md has time and memory by the planner.
# Expected: nobody's score. Not run on a GPU by us: the miniature (examples/quickstart/pipeline.sh) is tested.
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
