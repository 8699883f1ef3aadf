#!/bin/bash
# Evaluate a run or a model on one GPU; the arguments are `neuclip evaluate`'s.
#
#     sbatch slurm/evaluate.sh RUN_OR_MODEL [--data EVAL] [--json RESULT]     as a job, with sbatch's own options
#     slurm/evaluate.sh RUN_OR_MODEL [...]                                    looked at here first, then submitted
#
# Without --data the sets are those of NEUCLIP_EVALUATION in site.env; without --json the scores go to
# RUN_OR_MODEL/evaluation.json where that is a folder.
#SBATCH --job-name=neuclip-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=96G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
here=$(dirname "$0") # a job has a copy of this script alone: then Slurm tells where it was
[[ -f $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/evaluate\.sh.*|\1|p' | head -1)
# shellcheck source=common.sh
source "$here/common.sh"

given=("$@")
[[ -e ${1:-} ]] || fail 2 "usage: slurm/evaluate.sh RUN_OR_MODEL [--data EVAL] ...   RUN_OR_MODEL '${1:-}': no such file or folder"
sets=
for ((place = 0; place < ${#given[@]}; place++)); do
    case ${given[place]} in
        --data) sets=${given[place + 1]:-} ;;
        --data=*) sets=${given[place]#--data=} ;;
    esac
done
if [[ -z $sets ]]; then
    sets=${NEUCLIP_EVALUATION:-}
    given+=(--data "$sets")
fi
[[ -d $sets ]] || fail 2 "--data '$sets': no such folder; give --data, or NEUCLIP_EVALUATION in site.env"
if [[ -d $1 && " ${given[*]}" != *" --json"* ]]; then given+=(--json "$1/evaluation.json"); fi

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    submit "$0" "$@"
    echo "submitted: $job"
    exit
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
exec srun --ntasks=1 ${NEUCLIP_SRUN_OPTIONS[@]+"${NEUCLIP_SRUN_OPTIONS[@]}"} "${neuclip[@]}" evaluate "${given[@]}"
