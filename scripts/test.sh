#!/usr/bin/env bash
# Checks the style and runs the tests, on PROCESSES processes (2). With arguments, which go to
# pytest, runs what they name on one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

prepare dev
cd "$ROOT"
say "Checking the style"
"$VENV/bin/ruff" check --quiet .
"$VENV/bin/ruff" format --check --quiet .
say "Running the tests"
if (($#)); then
  exec "$VENV/bin/python" -m pytest "$@"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$VENV/bin/python" -m pytest -n "${PROCESSES:-2}" --dist worksteal --ignore tests/parallel
# These start processes of their own.
exec "$VENV/bin/python" -m pytest tests/parallel
