#!/bin/bash
# DataComp xlarge: ViT-L/14, 12.8 billion samples, global batch 90,112, bf16, ZeRO, gradient cache; 16 nodes or
# another number whose GPUs divide the recipe's data.num_streams: 1, 2, 4, ... 32; 64 and 128 with
# train.micro_batch_size=0, for then a GPU has fewer pairs than a micro-batch.
#
#     sbatch slurm/train_xl.sh [RECIPE ARGUMENTS ...]                        as a job, with sbatch's own options
#     slurm/train_xl.sh [--nodes N] [--check] [RECIPE ARGUMENTS ...]         checked here first, then submitted
#
#SBATCH --job-name=neuclip-xl
#SBATCH --nodes=16
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
[[ -f $here/common.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/train_xl\.sh.*|\1|p' | head -1)
# shellcheck source=common.sh
source "$here/common.sh"

train datacomp_xlarge engine.name=deepspeed engine.deepspeed.config=zero1 -- "$@"
