#!/usr/bin/env bash
# Train a config on this machine: bash launch/local.sh configs/speed_rl.py [more flags of maskrl_jax.main]
set -euo pipefail
usage="usage: bash launch/local.sh <config> [flags of maskrl_jax.main]"
case ${1:-} in
  --help | -h) echo "$usage" && exit ;;
  '' | -*) echo "error: give a config first, such as configs/speed_rl.py; $usage" >&2 && exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# Huge pages for what XLA allocates anew at every step: far fewer page faults, shorter steps on CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec .venv/bin/python -m maskrl_jax.main --config="$1" "${@:2}"
