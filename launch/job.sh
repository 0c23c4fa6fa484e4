# What the Slurm scripts have in common, read by them once their settings are known; `bert2bert submit` writes it into
# the scripts that it makes. It finds the Python to run, stops the job's step in time, and has a stopped job run again.
# shellcheck shell=bash disable=SC2034  # variables are the scripts'

fact() { # NAME: what Slurm knows of this job
    scontrol show job "$SLURM_JOB_ID" | sed -nE "s#(^|.* )$1=([^ ]*).*#\2#p" | head -n 1
}

seconds() { # TIME: since 1970; fails for a time that is not set
    [ -n "$1" ] && date -d "$1" +%s 2> /dev/null
}

# ------------------------------------------------------------------------------------------------ where Python runs

python=()   # the words before a Python program's own, in a task
in_srun=()  # options of srun for it
prepare_python() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export SLURM_EXPORT_ENV=ALL # all that is exported here reaches every task, whatever sbatch was given
    # Since Slurm 22.05 srun does not take it over from sbatch by itself.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
    local more words
    read -ra more <<< "${CONTAINER_OPTIONS:-}"
    if [ -n "${CONTAINER:-}" ]; then
        PYTHON=${PYTHON:-python3}
        if [ -d "$CONTAINER" ] || [[ $CONTAINER = *.sif ]]; then
            [ -e "$CONTAINER" ] || mistake "CONTAINER is $CONTAINER: there is no such image"
            words=(apptainer exec --bind "$PROJECT" --pwd "$PROJECT")
            [ -z "${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-}" ] || words+=(--nv)
            python=("${words[@]}" "${more[@]}" "$CONTAINER" "$PYTHON")
        else # enroot, by the plugin pyxis of srun; what an image sets itself must be named to be replaced
            local names
            names=$(compgen -e | grep -E '^((NCCL|GLOO|DS|DEEPSPEED|TORCH|HF)_|OMP_NUM_THREADS$)' | paste -sd,)
            in_srun=(--container-image="$CONTAINER" --container-mounts="$PROJECT:$PROJECT"
                --container-workdir="$PROJECT" --container-env="$names" "${more[@]}")
            python=("$PYTHON")
        fi
        return
    fi
    PYTHON=${PYTHON:-$PROJECT/.venv}
    [ ! -d "$PYTHON" ] || PYTHON=$PYTHON/bin/python
    command -v "$PYTHON" > /dev/null ||
        mistake "PYTHON is $PYTHON: there is no such program; name a virtual or conda environment"
    local home
    home=$(dirname "$(dirname "$(command -v "$PYTHON")")")
    export PATH=$home/bin:$PATH # the environment's own mpirun, ninja
    if [ -d "$home/conda-meta" ]; then
        export CONDA_PREFIX=$home
        local script
        for script in "$home"/etc/conda/activate.d/*.sh; do
            # shellcheck disable=SC1090
            [ ! -f "$script" ] || { set +u; . "$script"; set -u; }
        done
    fi
    python=("$PYTHON")
}

mistake() { # TEXT: of a user
    echo "error: $1" >&2
    exit 2
}

# ------------------------------------------------------------------------------------------------ stopping in time

ask_before_limit() { # SHELL: gets SIGUSR1 LEAD seconds before the limit, or when a quarter is left of a short one
    local start end now lead pause
    while :; do # the limit may be changed meanwhile
        start=$(seconds "$(fact StartTime)") && end=$(seconds "$(fact EndTime)") || return # no limit
        now=$(date +%s) lead=$(((end - start) / 4))
        [ "$lead" -lt "$LEAD" ] || lead=$LEAD
        pause=$((end - lead - now))
        [ "$pause" -gt 0 ] || { kill -USR1 "$1"; pause=30; }
        [ "$pause" -lt 300 ] || pause=300
        sleep "$pause" &
        trap "kill $! 2> /dev/null; exit" TERM
        wait "$!"
    done
}

STOP=TERM # what the step gets in time
status=0 asked=
step() { # COMMAND…: runs it; sets status. This shell outlives what its tasks get: it has to requeue the job
    local came child timer
    "$@" &
    child=$!
    trap 'came=yes' TERM INT HUP USR2
    trap 'came=yes asked=yes; kill -s "$STOP" "$child" 2> /dev/null' USR1 # from below, or of sbatch --signal=B:USR1@N
    ask_before_limit $$ &
    timer=$!
    while :; do
        came=
        wait "$child" && status=0 || status=$?
        [ -n "$came" ] || break
    done
    kill "$timer" 2> /dev/null || :
    trap : USR1
}

# ------------------------------------------------------------------------------------------------ running again

interrupted() { # whether the step was ended by what Slurm did, or was asked to end in time
    [ "$status" != 75 ] || return 0
    local preempted
    preempted=$(fact PreemptTime)
    [ -n "$asked" ] || [ "$(fact Reason)" = TimeLimit ] || [[ $preempted != None && $preempted > $(fact StartTime) ]]
}

end() { # NOTE BEFORE WHAT: ends the job with its step's status; one that was interrupted has itself run again first.
    # NOTE: the file that counts the starts in a row without a new WHAT, empty where every start begins from the
    # beginning; BEFORE: what `progress` printed before the step
    local note=$1 before=$2 what=$3 tries=0 state
    if [ "$status" = 0 ]; then
        [ -z "$note" ] || rm -f "$note"
        [ -z "${RECORD:-}" ] || echo "${KEY:-}" > "$RECORD" # of chain.sh: this part is complete
        exit 0
    fi
    interrupted || exit "$status"
    state=$(fact JobState)/$(fact Reason)
    case $state in
        RUNNING/* | COMPLETING/TimeLimit | TIMEOUT/*) ;;
        *) exit "$status" ;; # CANCELLED: somebody wants it to end
    esac
    if [ "$(progress)" = "$before" ]; then
        tries=${STARTS:-${SLURM_RESTART_COUNT:-0}}
        [ -z "$note" ] || read -r tries 2> /dev/null < "$note" || tries=0
        tries=$((tries + 1))
    fi
    [ -z "$note" ] || { mkdir -p "$(dirname "$note")" && rm -f "$note"; }
    if [ "$tries" -ge "$MAX_TRIES" ]; then
        echo "not requeued: $tries starts in a row brought no $what newer than $before; give the job more time" >&2
        exit "$status"
    fi
    if [ -n "$note" ]; then echo "$tries" > "$note"; else export STARTS=$tries; fi
    echo "requeued: stopped in time, newest $what $(progress)" >&2
    scontrol requeue "$SLURM_JOB_ID" || resubmit
    exit "$status"
}

resubmit() { # where a job may not requeue itself: the same again, behind this one; what waits for this one waits for it
    local options=(--parsable --dependency=afterany:"$SLURM_JOB_ID" --open-mode=append --chdir="$(fact WorkDir)")
    local pair value new
    for pair in job-name:JobName partition:Partition account:Account qos:QOS nodes:NumNodes ntasks:NumTasks \
        cpus-per-task:CPUs/Task time:TimeLimit constraint:Features reservation:Reservation output:StdOut; do
        value=$(fact "${pair#*:}")
        case $value in '' | '(null)' | UNLIMITED) ;; *) options+=("--${pair%%:*}=$value") ;; esac
    done
    value=$(fact TresPerNode | sed -nE 's#^gres[:/]gpu[:=]##p') # gres:gpu:8
    options+=("--gpus-per-node=${value:-0}" "--ntasks-per-node=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}")
    if ! new=$(sbatch "${options[@]}" "$0" "${words[@]}"); then
        echo "this cluster neither requeues this job nor takes it again from here: submit it again" >&2
        return
    fi
    new=${new%%;*}
    echo "submitted again as job $new, for this cluster does not requeue it" >&2
    local job waits
    squeue -h -t PENDING -o "%i %E" | while read -r job waits; do
        [ "$job" = "$new" ] || [[ $waits != *:$SLURM_JOB_ID[!0-9]* ]] ||
            scontrol update jobid="$job" \
                dependency="$(sed -E "s/\([a-z]*\)//g; s/:$SLURM_JOB_ID\b/:$new/g" <<< "$waits")"
    done
}
