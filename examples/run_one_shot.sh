#!/usr/bin/env bash
# A smaller model in a minute, without labels and without training: a file of texts calibrates it,
# one a line (or csv, tsv, jsonl, parquet). With TRAIN and EVAL it is healed as well, by distillation
# from the dense model.
#
#   TEXTS=corpus.txt examples/run_one_shot.sh                       # all-MiniLM-L6-v2
#   MODEL=my-encoder TEXTS=corpus.txt examples/run_one_shot.sh      # any model folder or hub name
#   TRAIN=pairs.csv EVAL=dev.csv HEAL_EPOCHS=14 examples/run_one_shot.sh
#   SPEEDUP=2 TEXTS=corpus.txt examples/run_one_shot.sh --family 1.5,3
#
# Without SPEEDUP, FFN_SPARSITY and MHA_SPARSITY go from every layer. Without TEXTS, TRAIN or MODEL,
# the sentences of STS-benchmark calibrate. COLUMNS_ARE names columns with unusual names.
set -euo pipefail

OUTPUT=${OUTPUT:-slim-one-shot}

if [[ -z ${MODEL:-} || (-z ${TEXTS:-} && -z ${TRAIN:-}) ]]; then
    listing=$(python -c '
from slimkern.cli.fetch import fetch_demo_files
files = fetch_demo_files()
print(files.model_dir, files.train, sep="\n")')
    mapfile -t found <<<"$listing"
    MODEL=${MODEL:-${found[0]}}
    if [[ -z ${TEXTS:-} && -z ${TRAIN:-} ]]; then
        TEXTS=${found[1]}
        COLUMNS_ARE="--delimiter tab --no-header --sentence1 5 --sentence2 6 --label 4"
    fi
fi

if [[ -n ${SPEEDUP:-} ]]; then
    cut=(--target-speedup "$SPEEDUP")
else
    cut=(--ffn2-sparsity "${FFN_SPARSITY:-0.5}" --mha-sparsity "${MHA_SPARSITY:-0.5}")
fi

# shellcheck disable=SC2086  # COLUMNS_ARE holds several words
exec slimkern slim "$MODEL" --output "$OUTPUT" "${cut[@]}" \
    ${TEXTS:+--calibration "$TEXTS"} ${TRAIN:+--train "$TRAIN"} ${EVAL:+--eval "$EVAL"} \
    ${TEST:+--test "$TEST"} ${HEAL_EPOCHS:+--heal-epochs "$HEAL_EPOCHS"} ${COLUMNS_ARE:-} "$@"
