#!/bin/bash
# Kinetics-400 on two nodes of four GPUs under Slurm, for as many days as it takes:
#
#     sbatch examples/slurm.sh
#
# Two minutes before the time limit Slurm warns this script (SIGUSR2). It hands the warning to the training
# processes, which finish their step, save and leave; then the job queues itself again and goes on from
# there (--resume auto). On preemption they get SIGTERM and save too; whether the job comes back then is the
# cluster's PreemptMode. A node that dies costs what was trained since the last checkpoint
# (--checkpoint-minutes); --requeue brings the job back.

#SBATCH --job-name=respike
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=respike-%j.log

# One process a GPU. -b is for each of them: 8 x 16 clips a step. -j: what --cpus-per-task leaves.
COMMAND=(
    python train_kinetics.py --dset kinetics400 -b 16 -T 16 --stride 2 -lr 0.0001 --model resnet50 -j 14 --downsample
    --run-dir runs/kinetics400 --resume auto --checkpoint-minutes 15
)

# How the processes find each other; train_kinetics.py reads these names, torchrun's.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

warned=no
warn() {
    warned=yes
    scancel --signal=USR2 "$SLURM_JOB_ID" # to the processes, not to this script
}
trap warn USR2

# shellcheck disable=SC2016 # the variables are those of each process
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' bash "${COMMAND[@]}" &
while kill -0 $! 2>/dev/null; do # a signal ends `wait`, not what it waits for
    wait $!
    status=$?
done

if [ $warned = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
