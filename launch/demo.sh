#!/usr/bin/env bash
# From nothing to an exported model: installs, makes the demo data, trains all stages on two ranks, reports.
# Usage: bash launch/demo.sh [KEY=VALUE ...]     e.g. run_dir=runs/second seed=1
# The same command continues an interrupted run. Ranks: QWEN2VL_RANKS (2).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/install.sh" ""

# One thread per rank on two cores: more would make the ranks compete.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc-per-node "${QWEN2VL_RANKS:-2}" -m qwen2vl_train train experiment=demo "$@"
