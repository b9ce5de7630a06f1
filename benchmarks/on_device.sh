#!/usr/bin/env bash
# On a machine with a GPU: some tests, then Linear layers and a Llama, timed. It takes minutes.
#
#     bash benchmarks/on_device.sh [--quick] [FOLDER]
#
# FOLDER (out/device) gets the tests' last lines, the results as JSON and as tables, and the card's
# name. JAX with its CUDA plugin and setuptools 77 have to be there, and JAX 0.12 to test and time
# strategy="pallas"; PyTorch and PEFT are measured where they are. What is missing can lie in .whl/
# as wheels: no network is needed. loha-jax itself is installed from this folder into the active
# environment. --quick, tiny shapes, shows on any machine that the script works.
set -euo pipefail
cd "$(dirname "$0")/.."
quick=
folder=out/device
for argument in "$@"; do
    case $argument in
        --quick) quick=yes ;;
        -*) echo "on_device.sh: $argument is no option; there is --quick" >&2; exit 2 ;;
        *) folder=$argument ;;
    esac
done
mkdir -p "$folder"

if compgen -G ".whl/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$folder/site" .whl/*.whl
    export PYTHONPATH="$folder/site${PYTHONPATH:+:$PYTHONPATH}"
fi
python3 -m pip install -q --no-deps --no-build-isolation -e .
python3 - << 'PYTHON' | tee "$folder/device.txt"
import jax
print(jax.__version__, *{f"{d.platform} {d.device_kind}" for d in jax.devices()})
PYTHON

# Products in float32 instead of TF32: the tests compare with float64.
failed=0
JAX_DEFAULT_MATMUL_PRECISION=highest python3 -m pytest -q -m "not slow" \
    ${quick:+--cases 1} tests/lowrank/test_hadamard.py tests/transform/test_compute_dtype.py \
    tests/transform/test_product_rules.py tests/transform/test_hopper_product.py > "$folder/tests.txt" 2>&1 || failed=1
tail -n 20 "$folder/tests.txt"

for case in linear-4096-8-256 linear-4096-8-2048 linear-4096-16-2048 llama; do
    [ -z "$quick" ] || case=linear
    python3 -m benchmarks "$case" ${quick:+--quick} --dtype bfloat16 --budget 6 \
        --json "$folder/$case.json" > "$folder/$case.md" || failed=1
    cat "$folder/$case.md"
    [ -z "$quick" ] || break
done
exit "$failed"
