#!/bin/bash
# Tokens of many images on the nodes of one Slurm job, through Ray. Submit: sbatch extract_ray.sh IMAGES OUT [options]
#   IMAGES  a folder, glob or .txt list that every node can read, or URLs
#   OUT     a folder on a file system that all nodes share, or a URL such as s3://bucket/features
#SBATCH --job-name=dvt-extract
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
# The same command goes on where it was stopped: let Slurm start it again after a preemption.
#SBATCH --requeue
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0
# Only this job may use its Ray (from version 2.52 on; older ones ask nobody).
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32)

images=$1 out=$2
shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Another port for each job, so that two jobs on one node do not meet.
port=$((20000 + SLURM_JOB_ID % 20000))
resources="--num-cpus=$SLURM_CPUS_PER_TASK --num-gpus=${SLURM_GPUS_ON_NODE:-0} --disable-usage-stats"

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$head" --port="$port" --include-dashboard=false $resources --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  # One node that fails does not take the others with it.
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" --no-kill --kill-on-bad-exit=0 \
    ray start --address="$head:$port" $resources --block &
fi

# The command is part of the cluster and runs on its first node. Workers on nodes that come up later join in.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  dvt extract "$images" --out "$out" --ray "$head:$port" "$@"
