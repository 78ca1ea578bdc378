#!/usr/bin/env bash
# Install what is needed and run everything that CI runs; the tests come last.
# Arguments go to pytest: scripts/check.sh -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh test dev
bin="$PWD/${VENV:-.venv}/bin"
[[ "${VENV:-}" == /* ]] && bin="$VENV/bin"

step() { echo "== $1"; }

step "format and lint"
"$bin/ruff" format --check .
"$bin/ruff" check .
step "size of files and functions"
"$bin/python" tests/gates/size.py
step "installed layout"
"$bin/python" tests/gates/layout.py build/layout
step "types"
"$bin/basedpyright" --pythonpath "$bin/python"
step "import direction"
(cd build/layout && "$bin/lint-imports" --config ../../pyproject.toml --no-cache)
step "tests"
# One process a core, one thread each: threads of small test tensors only get in each other's way.
OMP_NUM_THREADS=1 exec "$bin/python" -m pytest -n auto "$@"
