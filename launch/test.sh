#!/usr/bin/env bash
# Lint and test: bash launch/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/python -m ruff check .
# Two workers: most tests wait for the compiler, which uses one core.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
