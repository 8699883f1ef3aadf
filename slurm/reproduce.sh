#!/bin/bash
# A reproduction as a chain of jobs: preparing without GPUs, one training job for each method and seed, its evaluation,
# the report. Run it on a login node, not with sbatch; the arguments are `neuclip reproduce`'s:
#
#     slurm/reproduce.sh cc3m --list Train_GCC-training.tsv --evaluation /data/datacomp_eval
#
# What is done is not submitted again: after a failure give the same command, once no job of the last one is left.
# --dry-run prints all of it and submits nothing. REPRODUCE_LOGS names the folder of the logs (reproduce-logs). Downloading
# needs the network on a compute node: where there is none, do `neuclip reproduce ... --until download` on the login node.
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
here=$(dirname "$0") # a job has a copy of this script alone: then Slurm tells where it was
[[ -f $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/reproduce\.sh.*|\1|p' | head -1)
# shellcheck source=common.sh
source "$here/common.sh"

if [[ -z ${REPRODUCE_STAGE+x} ]]; then
    for argument in "$@"; do
        case $argument in -h | --help | --dry-run) exec "${neuclip[@]}" reproduce "$@" ;; esac
    done
    if [[ ${NEUCLIP_REQUEUE:-1} != 1 || ${NEUCLIP_CHAIN:-1} != 1 ]]; then
        fail 2 "NEUCLIP_REQUEUE=0 or NEUCLIP_CHAIN: evaluations wait for one job each, which must be requeued; unset them"
    fi
    given=("$@")
    if [[ -n ${NEUCLIP_EVALUATION:-} && " $*" != *" --evaluation"* ]]; then given+=(--evaluation "$NEUCLIP_EVALUATION"); fi
    table=$("${neuclip[@]}" reproduce "${given[@]}" --show jobs) || fail 2 "nothing was submitted, for the reason above"
    if [[ -z $table ]]; then
        echo "nothing is left to do"
        exit
    fi
    # A run that cannot be is refused before anything waits in the queue; seeds of one method differ in nothing else.
    declare -A checked
    while IFS=$'\t' read -r stage _ kind nodes gpus; do
        if [[ $kind != train || -n ${checked[${stage%-seed*}]:-} ]]; then continue; fi
        checked[${stage%-seed*}]=1
        export NEUCLIP_TASKS_PER_NODE=${NEUCLIP_TASKS_PER_NODE:-$((gpus ? gpus : 1))}
        overrides=$("${neuclip[@]}" reproduce "${given[@]}" --only "$stage" --show train)
        mapfile -t overrides <<<"$overrides"
        recipe=${overrides[0]}
        train_arguments "${overrides[@]:1}"
        check "$nodes"
    done <<<"$table"
    logs=${REPRODUCE_LOGS:-reproduce-logs}
    mkdir -p "$logs"
    declare -A id
    while IFS=$'\t' read -r stage after kind nodes gpus; do
        options=("--job-name=${stage/\//-}" "--output=$logs/%x-%j.log" --kill-on-invalid-dep=yes)
        case $kind in
            train)
                options+=("--nodes=$nodes" "--ntasks-per-node=$NEUCLIP_TASKS_PER_NODE")
                if ((gpus)); then
                    options+=("--gpus-per-node=$NEUCLIP_TASKS_PER_NODE" --cpus-per-task=12 --mem=0 --exclusive)
                fi
                ;;
            evaluate) if ((gpus)); then options+=(--gpus-per-node=1); fi ;;
            *) options+=(${NEUCLIP_CPU_OPTIONS[@]+"${NEUCLIP_CPU_OPTIONS[@]}"}) ;;
        esac
        waits=
        for name in ${after//,/ }; do waits+=${id[$name]:+:${id[$name]}}; done
        # The report tells of what failed too.
        if [[ -n $waits && $kind == report ]]; then options+=("--dependency=afterany$waits"); fi
        if [[ -n $waits && $kind != report ]]; then options+=("--dependency=afterok$waits"); fi
        REPRODUCE_STAGE=$stage submit --export=ALL "${options[@]}" "$0" "${given[@]}"
        id[$stage]=$job
    done <<<"$table"
    echo "submitted: ${submitted[*]}; logs in $logs"
    exit
fi

[[ -n $REPRODUCE_STAGE ]] || fail 2 "REPRODUCE_STAGE '': give the name of a stage"
if [[ $REPRODUCE_STAGE != train/* ]]; then
    # Before the time limit the stage is ended and queued again: each goes on where it was.
    "${neuclip[@]}" reproduce "$@" --only "$REPRODUCE_STAGE" &
    doing=$!
    trap 'kill -TERM "$doing"; wait "$doing" || true; scontrol requeue "$SLURM_JOB_ID"; sleep 60; exit 75' USR1
    wait "$doing"
    exit
fi
overrides=$("${neuclip[@]}" reproduce "$@" --only "$REPRODUCE_STAGE" --show train)
mapfile -t overrides <<<"$overrides"
recipe=${overrides[0]}
train "$recipe" -- "${overrides[@]:1}"
