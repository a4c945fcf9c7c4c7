#!/usr/bin/env bash
# Train on several machines, a process for each GPU; started again by itself until the run is finished:
#   sbatch experiments/clusters/slurm_train.sh RUN pretrain --config large_lora --data prepared/mine
# RUN is the run's folder (--output). It and the data are on a file system that all machines share.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
# Each process sees all GPUs of its machine and takes its own (SLURM_LOCALID): no --gpus-per-task.
set -uo pipefail
run=$1
shift
resume=()
[[ -e $run/config.json ]] && resume=(--resume)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # of Slurm 22.05 and later srun does not take it over
srun behrt-jax "$@" --output "$run" "${resume[@]}" --distributed auto
status=$?
# srun gives the highest status of all processes. 138: stopped by SIGUSR1, three minutes before the time is up.
# 137, 75: one was killed, or has ended with an error, which may come again: not more often than 20 times.
if ((status == 138)) || (((status == 137 || status == 75) && ${SLURM_RESTART_COUNT:-0} < 20)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
