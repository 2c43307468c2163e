"""The paper's comparisons as one sweep: branches, fusion, stride, frames, and what a residual frame is.

    python -m experiments.ablations --out runs/ablations --seeds 1 2 3 -- --dset hmdb51 --model resnet50 -b 32

What stands behind `--` goes to the training script of every run. A run is a variant with a seed; it has a folder of its
own in --out. The same command goes on if the sweep was stopped or killed. The end is a table, as table.md and
table.csv in --out: video top-1, energy a clip (evaluate.py --energy) and training time, mean and deviation over seeds.

On the generated demo videos, two epochs of small frames cost about 4 minutes of one CPU core a run:

    python -m experiments.ablations --only base ann snn lean concat stride2 previous none --jobs 2 -- --dset demo \\
        --weights none -T 8 --size 32 -b 16 -lr 0.05 --clip-norm 1 --epochs 2 -j 0 --keep 1

A run of two epochs has not converged: it tells apart what can learn the motion from what cannot, and little more.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.sweep import ROOT, Run, add_sweep_flags, mean_deviation, run_all, write_tables
from utils.errors import ArgumentParser
from utils.script import run_script

# ---- edit here: flags of every run, and what each variant changes. The flags behind `--` come between. --------
BASE = "-T 16 --stride 4 --residual key --branches both --fusion cross --downsample"
VARIANTS = {
    "base": "",
    "ann": "--branches ann",
    "snn": "--branches snn",
    "lean": "--fusion lean",
    "concat": "--fusion concat",
    "stride2": "--stride 2",
    "previous": "--residual previous",
    "none": "--residual none",
    "T8": "-T 8",
    "T32": "-T 32",
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train every variant with every seed; a table in the end.")
    parser.add_argument("--out", default="runs/ablations", metavar="FOLDER", help="folder of the run folders")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="variants: "
        f"{', '.join(VARIANTS)}")  # fmt: skip
    add_sweep_flags(parser)
    parser.add_argument("--script", default="train_fusion.py", metavar="FILE", help="or train_kinetics.py")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of the training script")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    out, flags = Path(args.out), (*shlex.split(BASE), *args.flags)
    runs = {
        (name, seed): Run(
            out / f"{name}-{seed}", ROOT / args.script,
            (*flags, *shlex.split(VARIANTS[name]), "--seed", str(seed)),
        )
        for seed in dict.fromkeys(args.seeds)  # a whole table for the first seed, before the second begins
        for name in args.only
    }  # fmt: skip

    def table() -> str:
        return write_table(
            out, flags, {name: [runs[name, seed] for seed in dict.fromkeys(args.seeds)] for name in args.only}
        )

    status = run_all(list(runs.values()), args.jobs, table)
    print(table())
    return status


def write_table(out: Path, flags: Sequence[str], variants: dict[str, list[Run]]) -> str:
    """The table of the runs that are finished."""
    figures = {"video_top1": Run.top1, "energy_mj": Run.energy_mj, "seconds": Run.seconds}
    markdown = [["variant", "changed", "seeds", "video top-1, %", "energy a clip, mJ", "training, s"]]
    table = [["variant", "changed", "seeds", *(f"{name}_{part}" for name in figures for part in ("mean", "deviation"))]]
    for name, runs in variants.items():
        finished = [run for run in runs if run.finished()]
        pairs = [
            mean_deviation([figure(run) for run in finished], 3 if name == "energy_mj" else 1)
            for name, figure in figures.items()
        ]
        markdown.append([
            name, f"`{VARIANTS[name]}`" if VARIANTS[name] else "", str(len(finished)),
            *(mean if deviation == "-" else f"{mean} ± {deviation}" for mean, deviation in pairs),
        ])  # fmt: skip
        table.append(
            [name, VARIANTS[name], len(finished), *("" if text == "-" else text for pair in pairs for text in pair)]
        )
    return write_tables(out, flags, markdown, table)


if __name__ == "__main__":
    run_script(main)
