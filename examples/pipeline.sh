#!/usr/bin/env bash
# From a data set and a teacher to a student with a score; math/pipeline.sh and code/pipeline.sh give the defaults.
#
# Stages: prepare, answers, train, export, evaluate, report. The same command resumes after a stop, also within a stage.
# Stages don't track variables; after changing one, use a new RUN_DIR.
set -euo pipefail

# Sets are named as the scripts of data_prep; all are read from the hub, or from DATA_DIR/NAME or DATA_DIR/NAME.*.
RUN_DIR=$(realpath -m "${RUN_DIR:?}")
DATA_DIR=${DATA_DIR:-}
PREPARE_ARGS=${PREPARE_ARGS:-}     # further words of data_prep, as "--max_rows 256"
N_ANSWERS=${N_ANSWERS:-4}          # of the teacher to each training prompt
KEEP=${KEEP:-best}                 # of its answers: best, all or first
MIN_REWARD=${MIN_REWARD:-1}        # an answer below it is no demonstration
TEMPERATURE=${TEMPERATURE:-0.7}    # of the teacher's answers
GENERATE_ARGS=${GENERATE_ARGS:-}   # further words of hpd-verl generate, as "--tensor_parallel_size 2"
TEST_ROWS=${TEST_ROWS:-}           # problems of each test set; all
EVALUATE_ARGS=${EVALUATE_ARGS:-}   # further words of the evaluation, as "--n 8 --temperature 0.6"
EVALUATED=${EVALUATED-teacher before after} # models; empty for none

for name in $EVALUATED; do
    [[ $name =~ ^(teacher|before|after)$ ]] || { echo "Error: EVALUATED=$EVALUATED: choose of teacher, before and after" >&2; exit 2; }
done
[[ -f $RECIPE ]] || { echo "Error: RECIPE=$RECIPE: no such file; give a script of examples" >&2; exit 2; }

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/check_paths.sh
source "$examples/check_paths.sh"
check_paths RUN_DIR STUDENT TEACHER
export PYTHONPATH=$examples/..${PYTHONPATH:+:$PYTHONPATH} # of data_prep and examples.evaluation

stage() { # NAME COMMAND...
    python "$examples/stage.py" "$RUN_DIR" "$1" -- "${@:2}"
}

prepare() { # SET
    local source=()
    if [[ -n $DATA_DIR ]]; then
        source=(--local_dataset_path)
        for path in "$DATA_DIR/$1" "$DATA_DIR/$1".*; do
            [[ -e $path ]] && source+=("$path")
        done
        [[ ${#source[@]} -gt 1 ]] || { echo "Error: DATA_DIR=$DATA_DIR: holds no $1 and no $1.*; put the set's files there" >&2; exit 1; }
    fi
    # shellcheck disable=SC2086 # words
    stage "prepare_$1" python -m "data_prep.$1" "${source[@]}" --local_save_dir "$RUN_DIR/data/$1" $PREPARE_ARGS
}

evaluate() { # SET NAME MODEL
    # shellcheck disable=SC2086 # words
    stage "evaluate_$1_$2" python -m "examples.evaluation.$EVALUATION" --data "$RUN_DIR/data/$1/test.parquet" \
        --model "$3" --name "$2" --out "$RUN_DIR/scores/$1_$2.json" --max_tokens "$MAX_RESPONSE_LENGTH" \
        ${TEST_ROWS:+--max_rows "$TEST_ROWS"} $EVALUATE_ARGS
}

divergence() { # SET NAME MODEL
    stage "divergence_$1_$2" python -m examples.evaluation.divergence --data "$RUN_DIR/data/$1/test.parquet" \
        --answers "$RUN_DIR/scores/$1_teacher.json" --student "$3" --teacher "$TEACHER" --name "$2, KL" \
        --out "$RUN_DIR/scores/$1_$2_kl.json" ${TEST_ROWS:+--max_rows "$TEST_ROWS"}
}

results() { # SET: its results, the first of them what the others are compared with
    find "$RUN_DIR/scores" -name "$1_before.json" -o -name "$1_after.json" | sort -r
    find "$RUN_DIR/scores" -name "$1_teacher.json"
    find "$RUN_DIR/scores" -name "$1_*_kl.json" | sort -r
}

prepare "$TRAIN_SET"
for set in $TEST_SETS; do
    [[ $set == "$TRAIN_SET" ]] || prepare "$set"
    [[ -f $RUN_DIR/data/$set/test.parquet ]] || {
        echo "Error: TEST_SETS=$TEST_SETS: $set has no rows to test on; choose another set, or add --test_fraction to PREPARE_ARGS in another RUN_DIR" >&2
        exit 1
    }
done

# shellcheck disable=SC2086 # words
stage answers hpd-verl generate --prompts "$RUN_DIR/data/$TRAIN_SET/train.parquet" \
    --local_save_dir "$RUN_DIR/answers" --model "$TEACHER" --tokenizer "$STUDENT" --n "$N_ANSWERS" \
    --temperature "$TEMPERATURE" --max_tokens "$MAX_RESPONSE_LENGTH" --reward "$REWARDED" --keep "$KEEP" \
    --min_reward "$MIN_REWARD" $GENERATE_ARGS

read -r first_test _ <<<"$TEST_SETS"
stage train env STUDENT="$STUDENT" TEACHER="$TEACHER" TRAIN_FILE="$RUN_DIR/answers/train.parquet" \
    VAL_FILE="$RUN_DIR/data/$first_test/test.parquet" MAX_RESPONSE_LENGTH="$MAX_RESPONSE_LENGTH" \
    OUT_DIR="$RUN_DIR/train" bash "$RECIPE" "$@"

# Killed after the folder was there but before the stage was marked as done, it is written again.
stage export hpd-verl export "$RUN_DIR/train" "$RUN_DIR/student" --overwrite

# The teacher first: the others are held against its answers, word by word.
declare -A models=([teacher]=$TEACHER [before]=$STUDENT [after]=$RUN_DIR/student)
for set in $TEST_SETS; do
    for name in $EVALUATED; do
        evaluate "$set" "$name" "${models[$name]}"
        [[ $name == teacher || ! -e $RUN_DIR/scores/${set}_teacher.json ]] || divergence "$set" "$name" "${models[$name]}"
    done
done

# What is shown is made anew each time.
mkdir -p "$RUN_DIR/report" "$RUN_DIR/scores"
hpd-verl report "$RUN_DIR/train" --out "$RUN_DIR/report/training.png"
for set in $TEST_SETS; do
    mapfile -t files < <(results "$set")
    [[ ${#files[@]} -gt 0 ]] || continue
    printf '\n%s\n\n' "$set"
    python -m examples.evaluation.compare "${files[@]}" --html "$RUN_DIR/report/$set.html" --png "$RUN_DIR/report/$set.png"
done
printf '\n'
python "$examples/stage.py" "$RUN_DIR"
printf '\nThe student: %s\nPages: %s\n' "$RUN_DIR/student" "$RUN_DIR/report"
