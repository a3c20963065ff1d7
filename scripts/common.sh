# Sourced by the scripts beside it: `prepare EXTRA` makes an environment with the package in it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
TORCH_VERSION="2.13.0"

say() { printf '==> %s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# Installs the package with the extra $1 into $VENV, unless that was done for this setup.py.
prepare() {
  local extra="$1" python stamp wanted
  if [[ ! -x "$VENV/bin/python" ]]; then
    python="$(find_python)"
    say "Creating a virtual environment in $VENV"
    "$python" -m venv "$VENV"
  fi
  python="$VENV/bin/python"
  stamp="$VENV/.xfuser_adacorr-$extra"
  wanted="$ROOT $(cksum <"$ROOT/setup.py")"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    say "Using the environment in $VENV"
    return
  fi
  local pip=("$python" -m pip --disable-pip-version-check -qq)
  local constraint="$VENV/constraint.txt"
  : >"$constraint"
  if ! "$python" -c 'import torch' 2>/dev/null && ! has_gpu; then
    say "Installing torch $TORCH_VERSION (no NVIDIA GPU found)"
    "${pip[@]}" install "torch==$TORCH_VERSION"
  fi
  # Whatever torch is there stays: nothing below may replace it by another build.
  "$python" -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' \
    >"$constraint" 2>/dev/null || true
  say "Installing xfuser_adacorr[$extra] and what it needs (some minutes the first time)"
  "${pip[@]}" install --constraint "$constraint" --editable "$ROOT[$extra]"
  echo "$wanted" >"$stamp"
}
