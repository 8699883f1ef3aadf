#!/bin/bash
# DataComp large: ViT-B/16, 1.28 billion samples, global batch 8,192, gradient cache.
#
#     sbatch slurm/train_large.sh [RECIPE ARGUMENTS ...]                        as a job, with sbatch's own options
#     slurm/train_large.sh [--nodes N] [--check] [RECIPE ARGUMENTS ...]         checked here first, then submitted
#
#SBATCH --job-name=neuclip-large
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
here=$(dirname "$0") # a job has a copy of this script alone: then Slurm tells where it was
[[ -f $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/train_large\.sh.*|\1|p' | head -1)
# shellcheck source=common.sh
source "$here/common.sh"

train datacomp_large -- "$@"
