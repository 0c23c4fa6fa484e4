#!/bin/bash
# prepare -> small -> grow -> large, the large model from scratch beside them, -> report: Slurm jobs, each waiting for
# what it needs to succeed. Run it on the login node:
#
#   PREPARE="--text corpus/*.txt --heldout-fraction 0.01" launch/chain.sh
#   SEEDS="0 1 2" GROW_OPTIONS="--partition=cpu --nodes=2" launch/chain.sh --partition=gpu --set eval_every=500
#
#   launch/chain.sh [options of sbatch, for every job] [-- options of launch/pretrain.py, for every training]
#
# `--set` may stand in place of `--`. Run it again at any time, as it was: what is complete is passed over, a job that
# waits or runs is left alone, what is half done goes on. Stopped jobs requeue themselves, and those that wait for them
# go on waiting. Held-out text is evaluated by the trainings themselves (recipe.eval_every, and at the end): the report
# has the losses of all of them.
set -eu
cd "$(dirname "$0")/.."

# ---- the experiment; lists are separated by spaces ----
RUNS=${RUNS:-runs}                     # where everything lands
BINS=${BINS:-bins/wiki_books}
PREPARE=${PREPARE:-}                   # options of bert2bert prepare, if there are no BINS yet
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2_bf16.json}
SMALL=${SMALL:-recipes/bert_small.py}
LARGE=${LARGE:-recipes/bert_base_bert2bert.py}
SCRATCH=${SCRATCH:-recipes/bert_base_scratch.py} # the arm to compare with; - for none
CONFIG=${CONFIG:-recipes/configs/bert_base.json}
GROWTH=${GROWTH:---width aki --depth stack --lossy}
GROWN=${GROWN:-$RUNS/grown}
SEEDS=${SEEDS:-}                       # each has a chain of its own: runs/small-seed0, ...; none: the recipes' seeds
SMALL_ARGS=${SMALL_ARGS:-}             # more options of launch/pretrain.py for one of the trainings
LARGE_ARGS=${LARGE_ARGS:-}
SCRATCH_ARGS=${SCRATCH_ARGS:-}
PREPARE_OPTIONS=${PREPARE_OPTIONS:-}   # more options of sbatch for one of the jobs
SMALL_OPTIONS=${SMALL_OPTIONS:-}
GROW_OPTIONS=${GROW_OPTIONS:-}
LARGE_OPTIONS=${LARGE_OPTIONS:-}
SCRATCH_OPTIONS=${SCRATCH_OPTIONS:-}
REPORT_OPTIONS=${REPORT_OPTIONS:-}
# --------------------------------------------------------

options=() training=()
while [ $# -gt 0 ]; do
    case $1 in
        --) shift; training=("$@"); break ;;
        --set | --set=*) training=("$@"); break ;;
    esac
    options+=("$1")
    shift
done

records=$RUNS/chain # what is complete: a file for each part, with its command line and a checksum of the files in that
mkdir -p "$records"

# part NAME WHERE "JOB…" "OPTION…" SCRIPT WORD…: a job that makes WHERE behind those; sets `job`, or empties it
job=
part() {
    local name=$1 where=$2 behind=$3 own=$4 script=$5 key file word id
    shift 5
    key="$script $* $(for word in "$@"; do [ ! -f "$word" ] || cksum "$word"; done | cksum)"
    file=$records/$name.complete
    # By its name, a job is found that this script submitted before.
    id=$name-$(cd "$RUNS" && pwd | cksum | cut -d' ' -f1)
    job=$(squeue -h -u "$(id -un)" -n "$id" -o %A) # fails where Slurm does not answer: nothing is submitted twice
    job=${job%%$'\n'*}
    if [ -n "$job" ]; then
        echo "$name: job $job, submitted before"
        return
    fi
    if [ -z "$behind" ] && [ -e "$where" ] && [ "$(cat "$file" 2> /dev/null)" = "$key" ]; then
        echo "$name: complete, passed over ($where)"
        return
    fi
    local depends=()
    [ -z "$behind" ] || depends=(--dependency=afterok:"${behind// /:}" --kill-on-invalid-dep=yes)
    rm -f "$file"
    # shellcheck disable=SC2086  # lists of options
    job=$(RECORD=$file KEY=$key sbatch --parsable --export=ALL --job-name="$id" "${depends[@]}" \
        "${options[@]}" $own "$script" "$@")
    job=${job%%;*} # --parsable prints JOB or JOB;CLUSTER
    echo "$name: job $job${behind:+, behind $behind}"
}

behind() { # JOB…: those that there are, for `part`
    echo "$@" | xargs
}

if [ -e "$BINS/meta.json" ]; then
    echo "prepare: complete, passed over ($BINS)"
elif [ -z "$PREPARE" ]; then
    echo "error: there are no bins in $BINS; make them (bert2bert prepare), name others in BINS, or set PREPARE to" \
        "options of bert2bert prepare" >&2
    exit 2
else
    # shellcheck disable=SC2086
    UNLESS=$BINS/meta.json part prepare "$BINS" "" "$PREPARE_OPTIONS" launch/command.sbatch \
        prepare $PREPARE --output "$BINS"
fi
bins=$job all='' scratch_runs=() base_runs=()
# shellcheck disable=SC2086  # lists of options
for seed in ${SEEDS:-none}; do
    at='' set=()
    [ "$seed" = none ] || at=-seed$seed set=(--set "seed=$seed")
    grown=$GROWN$at
    part small$at "$RUNS/small$at" "$bins" "$SMALL_OPTIONS" launch/pretrain.sbatch \
        "$SMALL" "$DS_CONFIG" "$RUNS/small$at" --bins "$BINS" "${training[@]}" $SMALL_ARGS "${set[@]}"
    part grow$at "$grown" "$job" "$GROW_OPTIONS" launch/grow.sbatch \
        "$RUNS/small$at" "$grown" --config "$CONFIG" $GROWTH
    part large$at "$RUNS/base$at" "$job" "$LARGE_OPTIONS" launch/pretrain.sbatch \
        "$LARGE" "$DS_CONFIG" "$RUNS/base$at" --bins "$BINS" --from "$grown" "${training[@]}" $LARGE_ARGS \
        "${set[@]}"
    all="$all $job" base_runs+=("$RUNS/base$at")
    [ "$SCRATCH" != - ] || continue
    part scratch$at "$RUNS/scratch$at" "$bins" "$SCRATCH_OPTIONS" launch/pretrain.sbatch \
        "$SCRATCH" "$DS_CONFIG" "$RUNS/scratch$at" --bins "$BINS" "${training[@]}" $SCRATCH_ARGS "${set[@]}"
    all="$all $job" scratch_runs+=("$RUNS/scratch$at")
done
# shellcheck disable=SC2086
part report "$RUNS/report" "$(behind $all)" "$REPORT_OPTIONS" launch/command.sbatch \
    report "${scratch_runs[@]}" "${base_runs[@]}" --output "$RUNS/report"
