"""Batch norm of the SNN in three ways, tested with running statistics and with measured ones.

    python -m experiments.batch_norms --out runs/batch_norms -- --dset demo --size 64 --weights none -b 16 -lr 0.05 \\
        --clip-norm 1 --warmup-epochs 1 --epochs 6

What stands behind `--` goes to the training script. Every mode of --snn-bn is trained once with every seed, without
--precise-bn: the weights would be the same with it. The last epoch is then tested again by evaluate.py --precise-bn.
The table has the mean and the sample standard deviation over the seeds, of the video top-1 and of the loss of clips.
A sweep that was stopped goes on with the same command.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from experiments.sweep import (
    EVALUATE,
    Run,
    add_script_flag,
    add_sweep_flags,
    mean_deviation,
    parse_sweep,
    run_all,
    write_tables,
)
from models.batch_norm import BATCH_NORMS
from utils.errors import ArgumentParser, UserError
from utils.script import run_script
from utils.training.flags import whole

BASE = "-T 8 --stride 4 --downsample"  # edit here: flags of every run; those behind `--` come after them


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train every batch norm of the SNN with every seed; a table in the end.")
    parser.add_argument("--only", nargs="+", choices=BATCH_NORMS, default=list(BATCH_NORMS), metavar="NAME",
        help=f"modes: {', '.join(BATCH_NORMS)}")  # fmt: skip
    parser.add_argument("--precise-bn", type=whole(1), default=960, metavar="N", help="clips to measure statistics on")
    add_script_flag(parser)
    add_sweep_flags(parser, "runs/batch_norms")
    # Both rows of a mode are of the same network, tested on the same videos.
    return parse_sweep(parser, "--snn-bn", "--precise-bn", "--val-fraction")


def main() -> int:
    args = parse_args()
    out, flags = Path(args.out), (*shlex.split(BASE), *args.flags)
    runs = {
        mode: [
            Run(out / f"{mode}-{seed}", args.script, (*flags, "--snn-bn", mode, "--seed", str(seed)), False)
            for seed in dict.fromkeys(args.seeds)
        ]
        for mode in args.only
    }
    status = run_all([run for seeds in zip(*runs.values(), strict=True) for run in seeds], args.jobs, lambda: None)
    if status == 130:
        return status
    finished = {mode: [run for run in seeds if run.finished()] for mode, seeds in runs.items()}
    for run in (run for seeds in finished.values() for run in seeds):
        measure(run, args.precise_bn)
    print(write_table(out, flags, finished, args.precise_bn))
    return status


def measured_folder(run: Run, clips: int) -> Path:
    return run.folder / f"measured{clips}"


def measure(run: Run, clips: int) -> None:
    """Test the last epoch with statistics of so many clips, unless that is done. Raises UserError if it fails."""
    folder = measured_folder(run, clips)
    if (folder / "evaluation.json").exists():
        return
    print(f"{run.name}: batch norm is measured", flush=True)
    more = ["--precise-bn", str(clips), "--out", str(folder)]
    done = subprocess.run(
        [sys.executable, EVALUATE, run.folder / "last.pt", *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{run.name}: {done.stdout.strip().splitlines()[-1] if done.stdout else 'evaluate.py failed'}")


def write_table(out: Path, flags: tuple[str, ...], runs: dict[str, list[Run]], clips: int) -> str:
    markdown = [["--snn-bn", "statistics", "seeds", "video top-1, %", "loss"]]
    table = [["mode", "precise_bn", "seeds", "video_top1_mean", "video_top1_deviation", "loss_mean", "loss_deviation"]]
    for mode, seeds in runs.items():
        running = [run.metrics()[-1] for run in seeds]
        tested = [json.loads((measured_folder(run, clips) / "evaluation.json").read_text()) for run in seeds]
        losses = [line[f"{line['evaluated_on']}_loss"] for line in running]
        for name, number, of_clips, scored in (
            ("running", 0, losses, running),
            (f"of {clips} clips", clips, [result["loss"] for result in tested], tested),
        ):
            pairs = mean_deviation([line["video_top1"] for line in scored]), mean_deviation(of_clips, 3)
            shown = [mean if deviation == "-" else f"{mean} ± {deviation}" for mean, deviation in pairs]
            markdown.append([mode, name, str(len(seeds)), *shown])
            table.append([mode, number, len(seeds), *(text for pair in pairs for text in pair)])
    return write_tables(out, f"`{shlex.join(flags)}`", markdown, table)


if __name__ == "__main__":
    run_script(main)
