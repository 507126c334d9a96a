# The Python environment of the scripts; sourced by quickstart, test and check.
#
#   use_environment [EXTRA]   reuses the active virtual environment or .venv, or creates .venv, and installs the project
#                             (with EXTRA, such as dev) unless it is up to date.
#
# SCALING_LAB_TORCH        a torch other than that of constraints.txt: a pip requirement ("torch==2.11.0", "torch"), or
#                          "keep" for the one that is already installed.
# SCALING_LAB_TORCH_INDEX  a package index for torch (for a CUDA or a CPU build).
# PYTHON                   the interpreter for a new .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if command -v "$name" >/dev/null 2>&1 && supported "$name"; then echo "$name"; return; fi
  done
  fail "no Python 3.11, 3.12 or 3.13 was found (Hydra does not run on 3.14). Install one, or set PYTHON=/path/to/python3.11 $0"
}

use_environment() {
  local extra=${1:-} target stamp wanted
  cd "$root"
  if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
    target=$VIRTUAL_ENV
  elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
    target=$CONDA_PREFIX
  else
    target=$root/.venv
    if [ ! -x "$target/bin/python" ]; then
      local python
      python=$(find_python) || exit 2
      say "Creating .venv with $python"
      "$python" -m venv "$target" || fail "$python cannot make a virtual environment (on Debian: apt install python3-venv)."
    fi
  fi
  supported "$target/bin/python" || fail "$target has $("$target/bin/python" -V 2>&1); scaling_lab needs Python 3.11 to 3.13."
  "$target/bin/python" -m pip --version >/dev/null 2>&1 || "$target/bin/python" -m ensurepip >/dev/null 2>&1 ||
    fail "$target has no pip. Remove it and run again, or install pip there."
  PATH=$target/bin:$PATH
  export PATH VIRTUAL_ENV=$target
  # A stamp file per extra: reinstalling takes seconds, but a second quickstart should start immediately.
  stamp=$target/.scaling-lab${extra:+-$extra}.stamp
  wanted=$(cat pyproject.toml constraints.txt | cksum)-${SCALING_LAB_TORCH:-}-${SCALING_LAB_TORCH_INDEX:-}-$root
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  say "Installing scaling_lab into $target (about two minutes the first time)"
  install_project "$extra"
  echo "$wanted" >"$stamp"
}

install_project() {
  local extra=$1 constraints index=()
  constraints=$(mktemp)
  [ -n "${SCALING_LAB_TORCH_INDEX:-}" ] && index=(--index-url "$SCALING_LAB_TORCH_INDEX")
  case "${SCALING_LAB_TORCH:-}" in
    "") cp constraints.txt "$constraints" ;;
    keep) python -c 'import torch' 2>/dev/null || fail "SCALING_LAB_TORCH=keep, but torch is not installed in $VIRTUAL_ENV."
      grep -v '^torch==' constraints.txt >"$constraints" || true ;;
    *) grep -v '^torch==' constraints.txt >"$constraints" || true ;;
  esac
  if [ "${SCALING_LAB_TORCH:-}" != keep ]; then
    python -m pip install --quiet --disable-pip-version-check -c "$constraints" ${index[@]+"${index[@]}"} "${SCALING_LAB_TORCH:-torch}"
  fi
  python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".${extra:+[$extra]}"
  rm -f "$constraints"
}
