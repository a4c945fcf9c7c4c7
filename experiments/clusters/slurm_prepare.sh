#!/usr/bin/env bash
# Prepare records in 16 jobs side by side, then merge what they read in one:
#   prepare="experiments/clusters/slurm_prepare.sh --source omop --input DIR --output prepared/mine"
#   job=$(sbatch --parsable $prepare)
#   sbatch --array=0 --dependency="afterok:$job" $prepare --merge
#SBATCH --job-name=prepare
#SBATCH --array=0-15
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
set -euo pipefail
part=(--shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --workers "${SLURM_CPUS_PER_TASK:-1}")
[[ " $* " == *" --merge "* ]] && part=()
behrt-jax prepare "$@" "${part[@]}"
