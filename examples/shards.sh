#!/bin/bash
# Kinetics-400 in 16 jobs under Slurm, each with its own part of the videos. Either the index that the first training
# needs, or prepared files (docs/data.md):
#
#     sbatch examples/shards.sh dataset.build_index --dset kinetics400
#     sbatch examples/shards.sh dataset.prepare --dset kinetics400 --out data/kinetics400-prepared
#
# A job that was killed, or that reached its time limit, goes on where it was when it is started again, for example the
# fourth and the seventh:
#
#     sbatch --array=4,7 examples/shards.sh dataset.prepare --dset kinetics400 --out data/kinetics400-prepared

#SBATCH --job-name=respike-data
#SBATCH --array=1-16
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=respike-data-%A-%a.log

SHARDS=16 # as --array above; not $SLURM_ARRAY_TASK_COUNT, which is 2 if two of the jobs are started again

exec python -m "$@" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" --jobs "$SLURM_CPUS_PER_TASK"
