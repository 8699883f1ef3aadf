#!/bin/bash
# Reshard on many nodes: one job plans, an array copies, a last job adds up. Run it on a login node, not with sbatch:
#
#     slurm/reshard.sh 16 -i /data/pool -o /data/subset -s uids.npy --shuffle
#
# The first argument is the number of parts, the rest is `neuclip reshard`'s. After a failure run it again: what is
# complete is checked and kept. RESHARD_LOGS names the folder of the logs (reshard-logs). sbatch's own variables change
# what a job asks for: SBATCH_TIMELIMIT=2:00:00 slurm/reshard.sh ...
#
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
here=$(dirname "$0") # a job has a copy of this script alone: then Slurm tells where it was
[[ -f $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/reshard\.sh.*|\1|p' | head -1)
# shellcheck source=common.sh
source "$here/common.sh"

if [[ -z ${RESHARD_STEP:-} ]]; then
    parts=${1:-}
    if [[ ! $parts =~ ^[1-9][0-9]*$ ]]; then
        fail 2 "usage: slurm/reshard.sh PARTS -i POOL -o OUT ...   PARTS: 1 or more, not '$parts'"
    fi
    shift
    export RESHARD_PARTS=$parts
    logs=${RESHARD_LOGS:-reshard-logs}
    mkdir -p "$logs"
    # A job whose predecessor failed would otherwise wait in the queue for ever. A node that fails costs its part's
    # unfinished outputs only, so parts may be requeued.
    step() { submit ${on_cpus[@]+"${on_cpus[@]}"} --export=ALL,RESHARD_STEP="$1" --kill-on-invalid-dep=yes --requeue "${@:2}"; }
    step plan --job-name=reshard-plan --output="$logs/%x-%j.log" "$0" "$@"
    plan=$job
    step copy --job-name=reshard --output="$logs/%x-%A-%a.log" --array="1-$parts" --dependency="afterok:$plan" "$0" "$@"
    copy=$job
    step finish --job-name=reshard-finish --output="$logs/%x-%j.log" --dependency="afterok:$copy" "$0" "$@"
    echo "submitted: plan $plan, parts $copy, finish $job; logs in $logs"
    exit
fi

# Without --cpus-per-task Slurm gives a task what it has of the node. A -j among the arguments wins.
workers=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-0}}
case $RESHARD_STEP in
    plan) exec "${neuclip[@]}" reshard -j "$workers" "$@" --plan-only ;;
    copy) exec "${neuclip[@]}" reshard -j "$workers" "$@" --part "$SLURM_ARRAY_TASK_ID/$RESHARD_PARTS" ;;
    finish) exec "${neuclip[@]}" reshard -j "$workers" "$@" --finish ;;
esac
