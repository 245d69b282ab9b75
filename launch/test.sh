#!/usr/bin/env bash
# Lint and test: bash launch/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest "$@"
