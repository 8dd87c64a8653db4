#!/usr/bin/env bash
# examples/math/hpd.sh with the teacher in servers of its own (docs/served.md): Qwen2.5 72B teaches Qwen2.5-1.5B.
#
#   URLS=http://host:8000[,http://other:8000] PAIR=... TRAIN_FILE=... VAL_FILE=... \
#       bash examples/math/hpd_served.sh [key=value ...]
#
# Start each server first, on GPUs of its own; with 8 of 80 GB:
#
#   vllm serve Qwen/Qwen2.5-72B-Instruct --runner pooling --convert embed --tensor-parallel-size 8 \
#       --max-model-len 10240 --port 8000 \
#       --pooler-config '{"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": false}'
#
# Or let the run start them, on 8 GPUs beside those of the trainer: URLS= and, as key=value,
# algorithm.hpd.teacher_server.n_gpus_per_node=8 algorithm.hpd.teacher_server.tensor_model_parallel_size=8
#
# Variables: those of hpd.sh. TEACHER is what the server serves: of its files only config, tokenizer and the one with
# the output layer are read here. HPD_TEACHER_API_KEY: the server's key, if it has one.
# Expected score: none known.
# Tested: two steps of tiny models on a CPU; not on a GPU.
set -euo pipefail

export TEACHER=${TEACHER:-Qwen/Qwen2.5-72B-Instruct}
URLS=${URLS-http://localhost:8000}

exec bash "$(dirname "${BASH_SOURCE[0]}")/hpd.sh" "algorithm.hpd.teacher_server.urls=[$URLS]" "$@"
