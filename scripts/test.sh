#!/usr/bin/env bash
# Checks the style, runs the tests, on PROCESSES processes (2), and soaks the small pipelines. With
# arguments, which go to pytest, runs what they name on one.
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
"$VENV/bin/python" -m pytest tests/parallel
say "Soaking for half a minute"
SOAKED="$(mktemp -d)"
trap 'rm -rf "$SOAKED"' EXIT
"$VENV/bin/python" -m benchmark soak --minutes 0.5 --output_dir "$SOAKED"
