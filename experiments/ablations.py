"""The paper's comparisons as one sweep: branches, fusion, stride, frames, what a residual frame is, and other networks.

    python -m experiments.ablations --out runs/ablations --seeds 1 2 3 -- --dset hmdb51 --model resnet50 -b 32

What stands behind `--` goes to the training script of every run. A run is a variant with a seed; it has a folder of its
own in --out. The variants stand in experiments/variants.py. The same command goes on if the sweep was stopped or
killed. The end is a table, as table.md and table.csv in --out: video top-1, energy a clip (evaluate.py --energy) and
training time, mean and deviation over seeds.

On the generated demo videos, two epochs of small frames cost about 4 minutes of one CPU core a run:

    python -m experiments.ablations --only cross ann snn lean concat stride2 previous none --jobs 2 -- --dset demo \\
        --weights none -T 8 --size 32 -b 16 -lr 0.05 --clip-norm 1 --epochs 2 -j 0 --keep 1

A run of two epochs has not converged: it tells apart what can learn the motion from what cannot, and little more.
"""

from pathlib import Path

from experiments.sweep import add_script_flag, add_sweep_flags, add_variant_flag, parse_sweep, sweep
from experiments.variants import choose
from utils.errors import ArgumentParser
from utils.script import run_script


def main() -> int:
    parser = ArgumentParser(description="Train every variant with every seed; a table in the end.")
    add_variant_flag(parser)
    add_script_flag(parser)
    add_sweep_flags(parser, "runs/ablations")
    args = parse_sweep(parser)
    cases = {str(seed): ("--seed", str(seed)) for seed in args.seeds}
    return sweep(Path(args.out), args.script, args.flags, choose(args.only, args.flags), cases, args.jobs)


if __name__ == "__main__":
    run_script(main)
