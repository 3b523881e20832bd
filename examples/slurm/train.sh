#!/bin/bash
# A denoiser, trained on the GPUs of several nodes. Submit: sbatch train.sh STORE OUT.safetensors [options of dvt train]
#SBATCH --job-name=dvt-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
# The same command goes on from its last checkpoint.
#SBATCH --requeue
set -euo pipefail

store=$1 out=$2
shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# One torchrun a node, one process a GPU. `accelerate launch` takes the place of torchrun with
#   accelerate launch --multi_gpu --num_machines $SLURM_JOB_NUM_NODES --machine_rank $SLURM_NODEID \
#     --num_processes $((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE)) --main_process_ip $head --main_process_port $port \
#     --module dvt.cli train ...
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --max-restarts=3 \
  -m dvt.cli train "$store" --out "$out" "$@"
