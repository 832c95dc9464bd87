#!/usr/bin/env bash
# Installs with the development extras, then style, types and tests. Usage: bash launch/test.sh [PYTEST ARGUMENTS]
# Real photographs are optional: QWEN2VL_REAL_DATA=FOLDER (with real/, bad/ and tokenizer/) enables the tests that use them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/install.sh" dev

ruff format --check .
ruff check .
mypy
exec python -m pytest -m "not gpu and not slow" "$@"
