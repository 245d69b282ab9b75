# Sourced by the other scripts: enters the repository root and makes sure that .venv holds requirements.txt.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 to 3.13 found; install one or set PYTHON to it" >&2
  return 1
}

# pip comes last, so a venv that was interrupted has none; made once more it is mended, and keeps what it holds.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  "$python" -m venv .venv || {
    echo "error: $python cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2
    exit 1
  }
fi
# The stamp is a copy of what was installed: a killed install leaves none, a changed file differs.
if ! cmp -s requirements.txt .venv/requirements.stamp; then
  echo "installing requirements.txt into .venv, a minute or two"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/requirements.stamp
fi
