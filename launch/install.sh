# Sourced by demo.sh and test.sh: makes .venv (or uses the active environment) and installs once.
# Usage: . launch/install.sh EXTRAS     e.g. "" or "dev"
# Installs again only when pyproject.toml or constraints.txt changed since.

extras="$1"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    chosen=""
    for candidate in python3 python3.12 python3.11 python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        chosen="$candidate"
        break
      fi
    done
    if [ -z "$chosen" ]; then
      echo "error: Python 3.11 or newer is needed and none was found on PATH" >&2
      exit 1
    fi
    echo "creating .venv with $("$chosen" --version)"
    "$chosen" -m venv .venv
  fi
  . .venv/bin/activate
fi

stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.qwen2vl-train-${extras:-base}"
wanted="$root $(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing qwen2vl-train${extras:+[$extras]} (several minutes the first time)"
  python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${extras:+[$extras]}"
  echo "$wanted" >"$stamp"
fi
