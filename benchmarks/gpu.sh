#!/usr/bin/env bash
# Everything worth knowing of a GPU, in one command and at most ten minutes:
#
#   bash benchmarks/gpu.sh                       # on CUDA
#   bash benchmarks/gpu.sh --device cpu --small  # the same on a CPU, in a small form
#
# Unit tests on the device, the output layer against its bare products, plain logits and TRL's fused loss, ten steps of
# the lean trainer and ten of main_ppo. A stage that fails or is skipped leaves the others be. All of it is written to
# one JSON file (--json, by default benchmarks/results/gpu.json), with the machine and the versions.
#
# An environment with torch is enough for the tests of the output layer and its benchmark; trainers need `.[gpu]`, the
# lean trainer's part without vLLM too. PYTHON names the environment's Python, TRL_PYTHON that of another one with TRL,
# which does not go into verl's.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
EXTRA=$(mktemp -d)
trap 'rm -rf "$EXTRA"' EXIT

# What the tests import beside torch, where it is missing: into a folder of this run alone.
MISSING=$("$PYTHON" - <<'PY'
from importlib.util import find_spec
print(*(name for name in ("numpy", "omegaconf", "pytest", "hypothesis") if find_spec(name) is None))
PY
)
if [ -n "$MISSING" ]; then
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --target "$EXTRA" $MISSING || echo "could not install: $MISSING"
fi
PYTHONPATH="$PWD:$EXTRA${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" benchmarks/gpu.py "$@"
