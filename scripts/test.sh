#!/usr/bin/env bash
# Checks the style and runs the tests. Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

prepare dev
cd "$ROOT"
say "Checking the style"
"$VENV/bin/ruff" check --quiet .
"$VENV/bin/ruff" format --check --quiet .
say "Running the tests"
exec "$VENV/bin/python" -m pytest "$@"
