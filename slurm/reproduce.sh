#!/bin/bash
# A reproduction as a chain of jobs: preparing without GPUs, one training job for each method and seed, its evaluation,
# the report. Run it on a login node, not with sbatch; the arguments are `neuclip reproduce`'s:
#
#     slurm/reproduce.sh cc3m --list Train_GCC-training.tsv --evaluation /data/datacomp_eval
#
# What is done is not submitted again: after a failure give the same command. REPRODUCE_NODES: nodes of a training, instead
# of the experiment's; REPRODUCE_LOGS: folder of the logs (reproduce-logs). Downloading needs the network on a compute node:
# where there is none, do `neuclip reproduce ... --until download` on the login node first.
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
here=$(dirname "$0") # a job has a copy of this script alone: then Slurm tells where it was
[[ -f $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/reproduce\.sh.*|\1|p' | head -1)
# shellcheck source=common.sh
source "$here/common.sh"

if [[ -z ${REPRODUCE_STAGE:-} ]]; then
    table=$("${neuclip[@]}" reproduce "$@" --show jobs) || fail 2 "nothing was submitted, for the reason above"
    logs=${REPRODUCE_LOGS:-reproduce-logs}
    mkdir -p "$logs"
    declare -A id
    while IFS=$'\t' read -r stage after kind nodes gpus; do
        options=("--job-name=${stage/\//-}" "--output=$logs/%x-%j.log" --kill-on-invalid-dep=yes)
        if ((gpus)); then options+=("--gpus-per-node=$gpus"); fi
        if [[ $kind == train ]]; then
            export NEUCLIP_TASKS_PER_NODE=${NEUCLIP_TASKS_PER_NODE:-$((gpus ? gpus : 1))}
            options+=("--nodes=${REPRODUCE_NODES:-$nodes}" "--ntasks-per-node=$NEUCLIP_TASKS_PER_NODE" --signal=B:USR1@300)
            if ((gpus)); then options+=(--cpus-per-task=12 --mem=0 --exclusive); fi
        fi
        waits=
        for name in ${after//,/ }; do waits+=${id[$name]:+:${id[$name]}}; done
        # The report tells of what failed too.
        if [[ -n $waits && $kind == report ]]; then options+=("--dependency=afterany$waits"); fi
        if [[ -n $waits && $kind != report ]]; then options+=("--dependency=afterok$waits"); fi
        REPRODUCE_STAGE=$stage submit --export=ALL "${options[@]}" "$0" "$@"
        id[$stage]=$job
    done <<<"$table"
    echo "submitted: ${submitted[*]}; logs in $logs"
    exit
fi

if [[ $REPRODUCE_STAGE != train/* ]]; then
    exec "${neuclip[@]}" reproduce "$@" --only "$REPRODUCE_STAGE"
fi
given=$("${neuclip[@]}" reproduce "$@" --only "$REPRODUCE_STAGE" --show train)
mapfile -t given <<<"$given"
recipe=${given[0]}
train "$recipe" -- "${given[@]:1}"
