# shellcheck shell=bash disable=SC2034
# What the scripts beside this file share. They source it; it is not run by itself.
#
# Settings of the site stand in site.env (copy site.env.example), or in the file that NEUCLIP_SITE names.
set -euo pipefail
slurm_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NEUCLIP_SITE=${NEUCLIP_SITE:-$slurm_folder/site.env}
# shellcheck source=/dev/null
if [[ -f $NEUCLIP_SITE ]]; then source "$NEUCLIP_SITE"; fi

fail() { # STATUS TEXT
    echo "error: $2" >&2
    exit "$1"
}

# The `neuclip` command, as an array.
if [[ -n ${NEUCLIP_MODULES:-} ]]; then
    # shellcheck disable=SC2086
    module load $NEUCLIP_MODULES
fi
if [[ -n ${NEUCLIP_CONTAINER:-} ]]; then
    read -ra neuclip <<<"${NEUCLIP_CONTAINER_RUN:-apptainer exec --nv}"
    neuclip+=("$NEUCLIP_CONTAINER" neuclip)
elif [[ -n ${NEUCLIP:-} ]]; then
    neuclip=("$NEUCLIP")
elif [[ -x $slurm_folder/../.venv/bin/neuclip ]]; then
    neuclip=("$slurm_folder/../.venv/bin/neuclip")
else
    neuclip=(neuclip)
fi

# Jobs without GPUs: `submit "${on_cpus[@]}" ...`, for which a partition of their own may be set.
on_cpus=(${NEUCLIP_CPU_OPTIONS[@]+"${NEUCLIP_CPU_OPTIONS[@]}"})

# Submitting: `submit ARGUMENTS...` leaves the id in $job. Once one is refused, those before it are cancelled.
submitted=()
submit() {
    if ! job=$(sbatch --parsable ${NEUCLIP_SBATCH_OPTIONS[@]+"${NEUCLIP_SBATCH_OPTIONS[@]}"} "$@"); then
        if ((${#submitted[@]})); then scancel "${submitted[@]}"; fi
        fail 1 "sbatch refused a job (its reason is above); cancelled: ${submitted[*]:-none}"
    fi
    job=${job%%;*} # "id;cluster" where there are several clusters
    submitted+=("$job")
}

# What `neuclip train` gets before the user's own arguments, which win.
train_arguments() {
    arguments=("$recipe" "run_dir=${NEUCLIP_RUNS:-runs}/$recipe")
    if [[ -n ${NEUCLIP_DATA:-} ]]; then arguments+=("data.train=$NEUCLIP_DATA/$recipe"); fi
    if [[ -n ${NEUCLIP_EVALUATION:-} ]]; then arguments+=("evaluation.data=$NEUCLIP_EVALUATION"); fi
    arguments+=("$@")
}

check() { # NODES: exits with 2 and the remedy if the run cannot be; sets run_dir and data
    local said name
    for name in TASKS_PER_NODE TRIES CHAIN RANK_WAIT PREFLIGHT_SECONDS; do # srun takes a wait of 0 for one without end
        name=NEUCLIP_$name
        [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || fail 2 "$name '${!name}': give a number, 1 or more"
    done
    tasks=${NEUCLIP_TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
    world_size=$(($1 * tasks))
    said=$("${neuclip[@]}" job check --world-size "$world_size" --gpu-memory-gib "${NEUCLIP_GPU_MEMORY_GIB:-0}" \
        "${arguments[@]}") || fail 2 "not started: $recipe on $1 node(s) with $tasks task(s) each, as said above"
    { read -r run_dir && read -r data; } <<<"$said"
}

# train RECIPE DEFAULTS... -- ARGUMENTS...: the whole of a training script, on a login node and in the job.
train() {
    recipe=$1 && shift
    local given=() only_check=0 nodes=${SLURM_JOB_NUM_NODES:-}
    while [[ $1 != -- ]]; do given+=("$1") && shift; done
    shift
    for argument in "$@"; do
        case $argument in -h | --help) exec "${neuclip[@]}" train "$recipe" --help ;; esac
    done
    while [[ ${1:-} == --check || ${1:-} == --nodes ]]; do
        if [[ $1 == --check ]]; then only_check=1 && shift && continue; fi
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail 2 "--nodes '${2:-}': give a number, 1 or more"
        [[ -z ${SLURM_JOB_ID:-} || $only_check == 1 || $2 == "$nodes" ]] ||
            fail 2 "--nodes $2 comes too late for a job of $nodes: sbatch --nodes=$2 $0 ..., or without sbatch"
        nodes=$2 && shift 2
    done
    train_arguments ${given[@]+"${given[@]}"} "$@"
    if [[ -z ${SLURM_JOB_ID:-} || $only_check == 1 ]]; then
        nodes=${nodes:-$(sed -n 's/^#SBATCH --nodes=//p' "$0")}
        check "$nodes"
        ((only_check)) || submit_chain "$nodes" "$0" "$@"
        exit 0
    fi
    # shellcheck source=in_job.sh
    source "$slurm_folder/in_job.sh"
    run_job
}

submit_chain() { # NODES SCRIPT ARGUMENTS...: one job, or NEUCLIP_CHAIN jobs, each after the one before
    local options=("--nodes=$1") length=${NEUCLIP_CHAIN:-1} after=()
    if [[ -n ${NEUCLIP_TASKS_PER_NODE:-} ]]; then
        options+=("--ntasks-per-node=$NEUCLIP_TASKS_PER_NODE" "--gpus-per-node=$NEUCLIP_TASKS_PER_NODE")
    fi
    shift
    if ((length > 1)); then
        NEUCLIP_SUBMISSION=chain-$(date +%s)-$$
        export NEUCLIP_REQUEUE=0 NEUCLIP_SUBMISSION
        options+=(--no-requeue)
    fi
    for ((link = 0; link < length; link++)); do
        submit "${options[@]}" ${after[@]+"${after[@]}"} "$@"
        after=("--dependency=afterany:$job")
    done
    echo "submitted: ${submitted[*]}; run folder $run_dir: neuclip status $run_dir"
}
