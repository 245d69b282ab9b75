#!/usr/bin/env bash
# Lint and test: bash launch/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/python -m ruff check .
# Two workers: most tests wait for the compiler, which uses one core. In the order of the files, whose last ones are
# short: by the number of tests, as xdist would have it, the longest few come last.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
