"""Cross-validation: every variant on every fold of a folder of lists, as one sweep.

    python -m experiments.folds --lists data/fights --only snn film cross --jobs 2 -- --size 96 -b 8 --epochs 6

The folder has lists train<k>.txt and val<k>.txt, one pair a fold, of lines `path label`; paths start from the folder
(or from --data-root behind `--`). If it has classes.txt, a class name a line, this names the labels. A run is a variant
on a fold with a seed: train_kinetics.py --dset list, with what stands behind `--`. The rest is as
`experiments.ablations` has it: the variants, going on with the same command, and the table, here with mean and
deviation over the folds.

Hyper-parameters that were chosen on a fold are not tested by it. Choose on one with --folds, and leave it out of what
is reported, or say so.
"""

import re
from pathlib import Path

from experiments.sweep import ROOT, add_sweep_flags, add_variant_flag, parse_sweep, sweep
from experiments.variants import choose
from utils.errors import ArgumentParser, UserError
from utils.script import run_script


def main() -> int:
    parser = ArgumentParser(description="Train every variant on every fold; a table in the end.")
    parser.add_argument("--lists", type=Path, required=True, metavar="FOLDER", help="of train<k>.txt and val<k>.txt, "
        "and perhaps classes.txt")  # fmt: skip
    parser.add_argument("--folds", nargs="+", metavar="K", help="these alone; not given: all of the folder")
    add_variant_flag(parser)
    add_sweep_flags(parser, "runs/folds", seeds=[1])
    args = parse_sweep(parser, "--train-list", "--val-list")
    cases = {
        f"fold{fold}.{seed}": (*lists, "--seed", str(seed))
        for seed in args.seeds
        for fold, lists in folds_of(args.lists, args.folds).items()
    }
    flags = ["--dset", "list", *args.flags]
    return sweep(Path(args.out), ROOT / "train_kinetics.py", flags, choose(args.only, flags), cases, args.jobs)


def folds_of(folder: Path, chosen: list[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Fold -> the flags that name its lists, in the order of their numbers. Raises UserError."""
    found = {}
    for file in folder.glob("train*.txt"):
        if match := re.fullmatch(r"train(\w*)\.txt", file.name):
            found[match[1]] = file
    if not found:
        raise UserError(f"--lists {folder}: expected lists train<k>.txt and val<k>.txt in it, found no train<k>.txt")
    for fold in chosen or ():
        if fold not in found:
            raise UserError(f"--folds {fold}: {folder} has no train{fold}.txt; it has {', '.join(sorted(found))}")
    folds, classes = {}, folder / "classes.txt"
    label_map = ("--label-map", str(classes)) if classes.exists() else ()
    for fold in sorted(chosen or found, key=lambda fold: (len(fold), fold)):
        val = folder / f"val{fold}.txt"
        if not val.is_file():
            raise UserError(f"{val}: no such file; expected the test videos of the fold of {found[fold].name}")
        folds[fold] = ("--train-list", str(found[fold]), "--val-list", str(val), *label_map)
    return folds


if __name__ == "__main__":
    run_script(main)
