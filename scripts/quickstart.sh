#!/usr/bin/env bash
# Install what is needed and run the quickstart; arguments go to examples/quickstart.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh examples
bin="$PWD/${VENV:-.venv}/bin"
[[ "${VENV:-}" == /* ]] && bin="$VENV/bin"
exec "$bin/python" examples/quickstart.py "$@"
