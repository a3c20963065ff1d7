#!/usr/bin/env bash
# Compares the cache methods on the shipped FLUX pipeline. Further arguments go to the benchmark.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

prepare test
say "Running the benchmark on the shipped FLUX pipeline"
exec "$VENV/bin/python" "$ROOT/benchmark/cache_execute.py" --model_type flux \
  --cache_methods None Fb Tea Fast Ada Auto --enable_adacorrection \
  --num_inference_steps 28 --num_prompts 8 --repetitions 2 "$@"
