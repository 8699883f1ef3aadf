#!/bin/bash
# Reshard on many nodes: one job plans, an array copies, a last job adds up. Run it on a login node, not with sbatch:
#
#     slurm/reshard.sh 16 -i /data/pool -o /data/subset -s uids.npy --shuffle
#
# The first argument is the number of parts, the rest is `neuclip reshard`'s. After a failure run it again: what is
# complete is checked and kept. NEUCLIP names the command, SBATCH_* variables set partition, account and time.
set -euo pipefail

if [[ -z ${RESHARD_STEP:-} ]]; then
    parts=${1:?usage: slurm/reshard.sh PARTS -i POOL -o OUT ...}
    shift
    export RESHARD_PARTS=$parts
    submit() { sbatch --parsable --export=ALL,RESHARD_STEP="$1" "${@:2}"; }
    plan=$(submit plan --job-name=reshard-plan "$0" "$@")
    copy=$(submit copy --job-name=reshard --array="1-$parts" --dependency="afterok:$plan" "$0" "$@")
    last=$(submit finish --job-name=reshard-finish --dependency="afterok:$copy" "$0" "$@")
    echo "submitted: plan $plan, parts $copy, finish $last"
    exit
fi

neuclip=${NEUCLIP:-neuclip}
workers=${SLURM_CPUS_PER_TASK:-0}
case $RESHARD_STEP in
    plan) exec "$neuclip" reshard "$@" -j "$workers" --plan-only ;;
    copy) exec "$neuclip" reshard "$@" -j "$workers" --part "$SLURM_ARRAY_TASK_ID/$RESHARD_PARTS" ;;
    finish) exec "$neuclip" reshard "$@" --finish ;;
esac
