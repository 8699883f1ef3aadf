#!/bin/bash
# DataComp small: ViT-B/32, 12.8 million samples, global batch 4,096.
#
#     sbatch slurm/train_small.sh [RECIPE ARGUMENTS ...]                        as a job, with sbatch's own options
#     slurm/train_small.sh [--nodes N] [--check] [RECIPE ARGUMENTS ...]         checked here first, then submitted
#
#SBATCH --job-name=neuclip-small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
here=$(dirname "$0") # a job has a copy of this script alone: then Slurm tells where it was
[[ -f $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/train_small\.sh.*|\1|p' | head -1)
# shellcheck source=common.sh
source "$here/common.sh"

train datacomp_small -- "$@"
