#!/usr/bin/env bash
# Checks and measures the package on a GPU in at most ten minutes:
#
#   bash benchmarks/gpu.sh                       # on CUDA
#   bash benchmarks/gpu.sh --device cpu --small  # a small form on a CPU
#
# Unit tests on the device; the output layer against its matrix products, plain logits and TRL's fused loss; ten steps
# of the lean trainer and of main_ppo. A stage that fails or is skipped does not stop the others. Results, machine and
# versions go to one JSON file (--json, default benchmarks/results/gpu.json).
#
# Tests and benchmark of the output layer need torch only; the trainers need `.[gpu]`, the lean trainer not vLLM. PYTHON
# names the environment's Python, TRL_PYTHON that of another environment with TRL.
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
