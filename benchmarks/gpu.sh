#!/usr/bin/env bash
# Everything worth knowing of a GPU, in one command and at most eight minutes:
#
#   bash benchmarks/gpu.sh                       # on CUDA
#   bash benchmarks/gpu.sh --device cpu --small  # the same on a CPU, in a small form
#   bash benchmarks/gpu.sh --packages DIR        # without a network: what is missing is in DIR
#
# In this order, each under its own limit: the output layer against its bare products, and TRL's and Liger's losses;
# steps of the lean trainer and of main_ppo without rollouts; a training step of 1.5B taught by 7B, random weights, with
# peak memory; unit tests on the device. What becomes of each is in gpu.json of the output folder (--out, by default
# benchmarks/results/gpu) as soon as it ends, with the machine and the versions, and its output beside it.
#
# PYTHON names the environment's Python, with torch at least; TRL_PYTHON that of another one with TRL, which does not go
# into verl's. DIR holds wheels (*.whl), which are installed for this run alone, or packages as pip --target leaves them.
set -euo pipefail
packages='' arguments=()
while (($#)); do
    case $1 in
        --packages) packages=$(cd "${2:?--packages: give a folder}" && pwd) && shift 2 ;;
        *) arguments+=("$1") && shift ;;
    esac
done
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
EXTRA=$(mktemp -d)
trap 'rm -rf "$EXTRA"' EXIT
install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile --target "$EXTRA" "$@"; }
export PYTHONPATH=$PWD:$EXTRA${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}

if compgen -G "$packages/*.whl" > /dev/null; then
    install --no-index --no-deps "$packages"/*.whl
fi
# What the tests import beside torch, where it is missing; and this package, by whose metadata verl finds it.
missing=$("$PYTHON" -c '
from importlib.util import find_spec
print(*(name for name in ("numpy", "omegaconf", "pytest", "hypothesis") if find_spec(name) is None))')
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    install ${packages:+--no-index --find-links "$packages"} $missing || echo "could not install: $missing"
fi
if ! "$PYTHON" -c 'import importlib.metadata as metadata; metadata.version("hpd-verl")' 2> /dev/null; then
    install --no-index --no-deps --no-build-isolation . || echo "could not install: hpd-verl, so trainers will not run"
fi
"$PYTHON" benchmarks/gpu.py "${arguments[@]}"
