#!/usr/bin/env bash
# Compares cache methods on the shipped FLUX pipeline, in about two minutes on two cores.
#
#   scripts/demo.sh                                                 # the first table
#   scripts/demo.sh --cache_methods None Fb Tea Fast Ada Auto --num_prompts 8 --repetitions 2
#
# Arguments go to the benchmark and win over those below; --help lists them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

prepare test
say "Running the benchmark on the shipped FLUX pipeline"
exec "$VENV/bin/python" "$ROOT/benchmark/cache_execute.py" --model_type flux \
  --cache_methods None Fb Tea Auto --enable_adacorrection \
  --num_inference_steps 28 --num_prompts 4 --repetitions 1 --warmup 0 "$@"
