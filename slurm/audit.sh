#!/bin/bash
# Audit downloads on one node, without a GPU; the arguments are `neuclip audit`'s.
#
#     sbatch slurm/audit.sh --manifest LIST --download DIR --output DIR       as a job, with sbatch's own options
#     slurm/audit.sh --manifest LIST --download DIR --output DIR              submitted from here
#
# A requeued job goes on where it was. Larger than a node's disk and patience: --engine spark --master spark://HOST:7077.
#SBATCH --job-name=neuclip-audit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
here=$(dirname "$0") # a job has a copy of this script alone: then Slurm tells where it was
[[ -f $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/audit\.sh.*|\1|p' | head -1)
# shellcheck source=common.sh
source "$here/common.sh"

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    [[ " $*" == *" --manifest"* && " $*" == *" --download"* ]] ||
        fail 2 "usage: slurm/audit.sh --manifest LIST --download DIR --output DIR ...   given: '$*'"
    submit ${on_cpus[@]+"${on_cpus[@]}"} "$0" "$@"
    echo "submitted: $job"
    exit
fi
# A discrepancy (status 1) is a result: the job does not fail for it, audit.json and the log tell.
status=0
"${neuclip[@]}" audit -j "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-0}}" "$@" || status=$?
echo "neuclip audit: exit status $status"
exit $((status == 1 ? 0 : status))
