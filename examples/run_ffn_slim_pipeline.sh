#!/usr/bin/env bash
# FFN channels alone: the heads stay. Everything else, the variables included, is run_auto_slim.sh's.
#
#   examples/run_ffn_slim_pipeline.sh
#   MODEL=bert-base-uncased FFN_SPARSITY=0.9 examples/run_ffn_slim_pipeline.sh
set -euo pipefail

export FFN_SPARSITY=${FFN_SPARSITY:-0.8}
export MHA_SPARSITY=0
export OUTPUT=${OUTPUT:-slim-ffn}

exec "$(dirname "${BASH_SOURCE[0]}")/run_auto_slim.sh" "$@"
