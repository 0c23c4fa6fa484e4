#!/bin/bash
# small -> grow -> large as three Slurm jobs, each waiting for the one before to succeed. Run it on the login node:
#
#   BINS=bins/wiki_books launch/chain.sh [options for every sbatch, such as --partition=gpu]
#
# Every line below can be run by itself, and all of it again at any time: what is complete is passed over, what is half
# done goes on. Stopped jobs requeue themselves, and the jobs that wait for them go on waiting.
set -eu
cd "$(dirname "$0")/.."

# ---- the experiment ----
BINS=${BINS:-bins/wiki_books}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2_bf16.json}
SMALL=${SMALL:-recipes/bert_small.py}
LARGE=${LARGE:-recipes/bert_base_bert2bert.py}
CONFIG=${CONFIG:-recipes/configs/bert_base.json}
GROWTH=${GROWTH:---width aki --depth stack --lossy}
RUNS=${RUNS:-runs}
GROWN=${GROWN:-$RUNS/grown}
# ------------------------

small=$(sbatch --parsable "$@" launch/pretrain.sbatch "$SMALL" "$DS_CONFIG" "$RUNS/small" --bins "$BINS")
small=${small%%;*} # --parsable prints JOB or JOB;CLUSTER
# shellcheck disable=SC2086  # GROWTH is a list of options
grow=$(sbatch --parsable --dependency=afterok:"$small" --kill-on-invalid-dep=yes "$@" \
    launch/grow.sbatch "$RUNS/small" "$GROWN" --config "$CONFIG" $GROWTH)
grow=${grow%%;*}
large=$(sbatch --parsable --dependency=afterok:"$grow" --kill-on-invalid-dep=yes "$@" \
    launch/pretrain.sbatch "$LARGE" "$DS_CONFIG" "$RUNS/base" --bins "$BINS" --from "$GROWN")
echo "small $small -> grow $grow -> large ${large%%;*}"
