"""What --init is worth on the demo: four motions fine-tuned from a network of the other four, and from scratch.

    python -m experiments.finetune --out runs/finetune --jobs 2

The eight classes are split in two: left, up, clockwise, grow to pre-train on; right, down, counter-clockwise, shrink to
fine-tune on. For each seed three runs: "pretrained" on the first four, "finetuned" (--init of the former) and "scratch"
on the others, with equal epochs and flags. Flags behind `--` go to train_kinetics.py and come after those of BASE. The
same command goes on if it was stopped or killed. The end is a table, as table.md and table.csv in --out: video top-1
after each epoch, mean and deviation over seeds.
"""

import argparse
import itertools
import shlex
from pathlib import Path

from dataset.demo import CLASSES, DemoSettings, generate_demo
from experiments.sweep import ROOT, Run, add_sweep_flags, mean_deviation, parse_sweep, run_all, write_tables
from utils.device import cpu_count
from utils.errors import ArgumentParser
from utils.files import writing
from utils.script import run_script

# ---- edit here -------------------------------------------------------------------------------------------------
BASE = (
    "--dset list --weights none --downsample -T 8 --stride 4 --size 32 -b 16 -lr 0.05 --clip-norm 1 "
    "--sampling window --no-flip -j 0 --keep 1"
)
EPOCHS = {"pretrained": 4, "scratch": 3, "finetuned": 3}
CLASSES_OF = {"pretrained": CLASSES[::2], "scratch": CLASSES[1::2], "finetuned": CLASSES[1::2]}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Fine-tuning against training from scratch, on the demo; a table in the end.")
    parser.add_argument("--data-root", default="data/demo", metavar="FOLDER", help="the demo's videos")
    add_sweep_flags(parser, "runs/finetune")
    return parse_sweep(parser, "--init", "--train-list", "--val-list")


def main() -> int:
    args = parse_args()
    out, demo = Path(args.out), Path(args.data_root)
    generate_demo(demo, DemoSettings(), workers=cpu_count())

    def run(kind: str, seed: int) -> Run:
        lists = write_lists(demo, out / "lists", CLASSES_OF[kind])
        flags = [*shlex.split(BASE), "--epochs", str(EPOCHS[kind]), *args.flags, *lists, "--seed", str(seed)]
        if kind == "finetuned":
            flags += ["--init", str(out / f"pretrained-{seed}" / "last.pt")]
        return Run(out / f"{kind}-{seed}", ROOT / "train_kinetics.py", tuple(flags), energy=False)

    runs = {kind: [run(kind, seed) for seed in dict.fromkeys(args.seeds)] for kind in EPOCHS}

    def table() -> str:
        return write_table(out, shlex.join([*shlex.split(BASE), *args.flags]), runs)

    status = run_all([*runs["pretrained"], *runs["scratch"]], args.jobs, table)
    if status != 130:
        trained = [run.finished() for run in runs["pretrained"]]  # else its last.pt is of an epoch in between
        status = max(status, run_all(list(itertools.compress(runs["finetuned"], trained)), args.jobs, table))
    print(table())
    return status


def write_lists(demo: Path, folder: Path, classes: tuple[str, ...]) -> list[str]:
    """The demo's lists with these classes alone, labelled from 0. Returns the flags that name them."""
    names = {part: folder / f"{classes[0]}-{part}.txt" for part in ("train", "val", "classes")}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names["classes"].write_text("".join(f"{name}\n" for name in classes))
        for part in ("train", "val"):
            videos = [line.split()[0] for line in (demo / f"{part}.txt").read_text().splitlines()]
            labels = [(video, Path(video).parent.name) for video in videos]
            lines = [f"{video} {classes.index(label)}\n" for video, label in labels if label in classes]
            names[part].write_text("".join(lines))
    return [
        "--data-root", str(demo), "--train-list", str(names["train"]), "--val-list", str(names["val"]),
        "--label-map", str(names["classes"]),
    ]  # fmt: skip


def write_table(out: Path, flags: str, runs: dict[str, list[Run]]) -> str:
    """Video top-1 after each epoch, of the runs that are finished."""
    most = max(EPOCHS.values())
    markdown = [["run", "motions", "seeds", *(f"after epoch {number}" for number in range(1, most + 1))]]
    table = [["run", "motions", "seeds", "epoch", "video_top1_mean", "video_top1_deviation"]]
    for kind in runs:
        finished = [run.metrics() for run in runs[kind] if run.finished()]
        row = [kind, ", ".join(CLASSES_OF[kind]), str(len(finished))]
        for epoch in range(most):
            values = [lines[epoch]["video_top1"] for lines in finished if epoch < len(lines)]
            mean, deviation = mean_deviation(values)
            row.append(mean if deviation == "-" else f"{mean} ± {deviation}")
            if values:
                table.append([*row[:3], epoch + 1, mean, "" if deviation == "-" else deviation])
        markdown.append(row)
    return write_tables(out, f"`{flags}`", markdown, table)


if __name__ == "__main__":
    run_script(main)
