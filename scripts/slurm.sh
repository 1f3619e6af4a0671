#!/usr/bin/env bash
# Train and score on one or several hosts of a Slurm cluster, with a task for each GPU.
#
#   sbatch scripts/slurm.sh                                                  # the demo, on 2 hosts with 8 GPUs each
#   CKPT=single_domain_01 MODE=finetune sbatch --nodes=4 scripts/slurm.sh data.batch_size=32
#   DRY=1 scripts/slurm.sh                                                   # only prints the commands, without Slurm
#
# CKPT is the name of a file in configs/, TASK of one in configs/tasks/, MODE probe or the name of one to lay over them,
# RUN the run's folder, where not runs/cls_CKPT... What follows are settings of train.py. A job that is preempted, or
# comes to its time limit, saves; sent again, it goes on. The hosts share this folder; docs/hosts.md says what they need
# where they do not. For hosts without GPUs: sbatch --gpus-per-node=0 --ntasks-per-node=1.
#SBATCH --job-name=octprobe
#SBATCH --output=octprobe_%j.log
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" # Slurm runs a copy of this script, elsewhere

CKPT=${CKPT:-demo} MODE=${MODE:-probe} TASK=${TASK:-} DRY=${DRY:-}
name=$CKPT${TASK:+_$TASK}
settings=(--config "configs/$CKPT.yaml")
[ -z "$TASK" ] || settings+=(--config "configs/tasks/$TASK.yaml")
if [ "$MODE" != probe ]; then
    name+=_$MODE
    settings+=(--config "configs/$MODE.yaml" "log.run_name=$name")
fi
run=${RUN:-runs/cls_$name}
for setting in "$@"; do
    case $setting in paths.run_dir=*)
        echo "error: $setting: name the run's folder with RUN=, for it is scored afterwards, too" >&2
        exit 1
        ;;
    esac
done

if [ -z "$DRY" ]; then
    # where the tasks meet: the first host, which has rank 0
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
    export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
fi

on_all() { # a command, in every task
    echo "srun $*"
    # shellcheck disable=SC2016  # each task has its own of these variables
    [ -n "$DRY" ] || srun --kill-on-bad-exit=1 bash -c '
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        exec "$@"' octprobe "$@"
}

on_all .venv/bin/python train.py "${settings[@]}" "paths.run_dir=$run" train.resume=auto "$@"
for split in val test; do
    on_all .venv/bin/python eval.py --ckpt "$run" --split "$split"
done
