#!/usr/bin/env bash
# A run as a SLURM array job: no scheduler of ours, no node that must stay up. Each task does its part and ends; one
# whose walltime comes near stops between two blocks and puts itself back into the queue.
#
#   emdvol reconstruct input.zarr --out iso.zarr --device cuda --executor none     # once: makes the output
#   sbatch --array=0-99 --partition=gpu pipelines/slurm/array.sh iso.zarr
#
# `emdvol reconstruct` with the same settings, or another array, finishes what is left, at any time.
#SBATCH --job-name=emdvol-array
#SBATCH --time=04:00:00
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --requeue
#SBATCH --open-mode=append

AGAIN=75 # status of a worker that stopped early: its time was up, or it was told to end

trap : TERM # meant for the worker, which stops in seconds
emdvol work "$1" --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
status=$?
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID of the last task is that of the whole array
if [ "$status" -eq "$AGAIN" ]; then
    case $(squeue --noheader --job "$task" --format "%T %r") in
        RUNNING* | *TimeLimit) scontrol requeue "$task" ;; # a task that was cancelled is not to come back
    esac
fi
exit "$status"
