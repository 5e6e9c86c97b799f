#!/usr/bin/env bash
# FFN channels and attention heads of a sentence-pair model (a cross-encoder, one score), slimmed by
# the reference recipe: as many epochs for the dense model as for the slim one, one before the
# sparsity grows, three to recover, distillation from the hidden states of the dense model.
#
#   examples/run_auto_slim.sh                                     # all-MiniLM-L6-v2 on STS-B
#   MODEL=BAAI/bge-small-en-v1.5 examples/run_auto_slim.sh        # any model folder or hub name
#   EPOCHS=6 OUTPUT=quick examples/run_auto_slim.sh --threads 2   # more options go to the command
#
# TRAIN, EVAL and TEST take files of your own (csv, tsv, jsonl, parquet); COLUMNS_ARE then names
# their columns where they have unusual names: COLUMNS_ARE="--sentence1 left --label similarity".
set -euo pipefail

FFN_SPARSITY=${FFN_SPARSITY:-0.8}
MHA_SPARSITY=${MHA_SPARSITY:-0.6}
EPOCHS=${EPOCHS:-13}
LR=${LR:-3e-5}
DENSE_LR=${DENSE_LR:-$LR}
OUTPUT=${OUTPUT:-slim-ffn-and-heads}

if [[ -z ${MODEL:-} || -z ${TRAIN:-} ]]; then
    listing=$(python -c '
from slimkern.cli.fetch import fetch_demo_files
files = fetch_demo_files()
print(files.model_dir, files.train, files.dev, files.test, sep="\n")')
    mapfile -t found <<<"$listing"
    MODEL=${MODEL:-${found[0]}}
    if [[ -z ${TRAIN:-} ]]; then
        TRAIN=${found[1]} EVAL=${found[2]} TEST=${found[3]}
        COLUMNS_ARE="--delimiter tab --no-header --sentence1 5 --sentence2 6 --label 4"
    fi
fi

# shellcheck disable=SC2086  # COLUMNS_ARE holds several words
exec slimkern slim "$MODEL" \
    --train "$TRAIN" --eval "${EVAL:?EVAL must name the evaluation file}" ${TEST:+--test "$TEST"} \
    ${COLUMNS_ARE:-} --task regression --output "$OUTPUT" \
    --method gradual --ffn2-sparsity "$FFN_SPARSITY" --mha-sparsity "$MHA_SPARSITY" \
    --scope local --decay exp --frequency 500 \
    --epochs "$EPOCHS" --lr "$LR" --dense-epochs "$EPOCHS" --dense-lr "$DENSE_LR" \
    --warm-epochs 1 --cooldown-epochs 3 --distill hidden=2 \
    --batch-size 16 --weight-decay 1e-7 --beta2 0.9 --max-length 128 --seed 11 "$@"
