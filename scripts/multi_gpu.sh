#!/usr/bin/env bash
# Compares the cache methods on several GPUs with xfuser's parallel engine.
#
#   scripts/multi_gpu.sh 2                    # Ulysses over 2 GPUs
#   scripts/multi_gpu.sh 4                    # Ulysses x ring, 2 x 2
#   scripts/multi_gpu.sh 8                    # two replicas of Ulysses x ring
#   MASTER=host0 NODE=0 scripts/multi_gpu.sh 16    # on the first of two nodes of 8 GPUs, and
#   MASTER=host0 NODE=1 scripts/multi_gpu.sh 16    # on the second
#   DEVICE=cpu scripts/multi_gpu.sh 2         # 2 processes on the CPU, over gloo
#
# Further arguments go to the benchmark: --model black-forest-labs/FLUX.1-dev --dtype bfloat16
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

GPUS="${1:-2}"
shift || true
case "$GPUS" in
  2) degrees=(--ulysses_degree 2) ;;
  4) degrees=(--ulysses_degree 2 --ring_degree 2) ;;
  8) degrees=(--ulysses_degree 2 --ring_degree 2 --data_parallel_degree 2) ;;
  16) degrees=(--ulysses_degree 8 --data_parallel_degree 2) ;; # sequences stay within a node
  *) fail "accepted: 2, 4, 8 or 16 GPUs, got $GPUS" ;;
esac

launch=(--nproc_per_node "$GPUS")
if [[ "$GPUS" == 16 ]]; then
  launch=(--nnodes 2 --nproc_per_node 8 --node_rank "${NODE:?0 or 1}")
  launch+=(--master_addr "${MASTER:?name of the first node}" --master_port "${PORT:-29500}")
fi
device=()
[[ -n "${DEVICE:-}" ]] && device=(--device "$DEVICE")

prepare test
say "Running the benchmark on $GPUS processes: ${degrees[*]}"
exec "$VENV/bin/torchrun" "${launch[@]}" "$ROOT/benchmark/cache_execute.py" --model_type flux \
  --cache_methods None Fast Fast+AdaCorrection Auto "${degrees[@]}" "${device[@]}" "$@"
