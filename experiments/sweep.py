"""Many trainings, one run folder each: what the experiments share.

A sweep that was stopped or killed goes on with the same command. Finished runs are not trained again. Machines are
shared, so the sweep counts the processor time of each run beside the time on the clock.
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.variants import BASE, RESPIKE, Variant
from utils.device import cpu_count
from utils.errors import ArgumentParser, UserError
from utils.files import write_atomically, writing
from utils.signals import StopRequest
from utils.training.flags import whole

ROOT = Path(__file__).parents[1]
EVALUATE = ROOT / "evaluate.py"
_POLL_SECONDS = 0.2
_OWN = ("--run-dir", "--output-dir", "--resume", "--overwrite", "--test-only", "--seed")


@dataclass(frozen=True)
class Run:
    """One training: `script` with `flags`, in `folder`; its output goes to a file beside the folder."""

    folder: Path
    script: Path
    flags: tuple[str, ...]
    energy: bool = True  # whether evaluate.py counts its operations in the end

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def times(self) -> Path:
        """A line for each start of the training, and of evaluate.py."""
        return self.folder.with_name(f"{self.name}.times.jsonl")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.name}.log")

    def check(self) -> None:
        """Raises UserError if the folder holds a run with other flags: a table would mix two settings."""
        script, *trained = self._config().get("command", [self.script.name, *self.flags])
        if script != self.script.name or tuple(trained[-len(self.flags) :]) != self.flags:
            raise UserError(
                f"{self.folder}: was trained with other flags ({shlex.join(trained)}); give the same flags, or name "
                "another folder",
                about="out",
            )

    def finished(self) -> bool:
        """Whether it has all its epochs and, if it chose the best one on validation videos, the test of that one."""
        epochs = self._config().get("flags", {}).get("epochs")
        has_epochs = epochs is not None and len(self.metrics()) >= epochs
        return has_epochs and (not self._validates() or (self.folder / "test.json").exists())

    def next_command(self) -> list[str] | None:
        """What is left to do: training, then the count of operations; None if all is done."""
        if not self.finished():
            # evaluate.py counts the energy, of the network that the accuracy is about.
            own = ["--run-dir", str(self.folder), "--resume", "auto", "--no-energy"]
            return [sys.executable, str(self.script), *own, *self.flags]
        if self.energy and EVALUATE.exists() and not (self.folder / "evaluation.json").exists():
            checkpoint = "best.pt" if self._validates() else "last.pt"
            return [sys.executable, str(EVALUATE), str(self.folder / checkpoint), "--energy"]
        return None

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, one for each epoch that was trained."""
        return [line for line in _lines(self.folder / "metrics.jsonl") if "epoch" in line]

    def top1(self) -> float:
        """Video top-1 in percent: of the test if the run chose its best epoch on validation videos (--val-fraction),
        else of the last epoch. The best epoch on the test set itself would be an optimistic choice."""
        scored = _read(self.folder / "test.json") if self._validates() else self.metrics()[-1]
        return scored["video_top1"]

    def energy_mj(self) -> float | None:
        """Of one clip; None if the operations were not counted."""
        return _read(self.folder / "evaluation.json").get("energy", {}).get("total_mj")

    def core_minutes(self) -> float | None:
        """Processor time of the training: all its processes, starts and tests, and what a killed start did in vain.
        None if no sweep has timed it."""
        seconds = [line["processor_seconds"] for line in _lines(self.times) if line["training"]]
        return sum(seconds) / 60 if seconds else None

    def seconds(self) -> float:
        """On the clock, spent on training, without tests and start."""
        # An epoch that was stopped in its evaluation has no rate of its own.
        rated = [line for line in self.metrics() if line["clips_per_second"] > 0]
        return sum(line["train_clips"] / line["clips_per_second"] for line in rated)

    def _config(self) -> dict:
        return _read(self.folder / "config.json")

    def _validates(self) -> bool:
        return self._config().get("flags", {}).get("val_fraction", 0) > 0


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def _lines(file: Path) -> list[dict]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line


# ---- the command line ---------------------------------------------------------------------------------


def add_sweep_flags(parser: ArgumentParser, out: str, seeds: Sequence[int] = (1, 2, 3)) -> None:
    parser.add_argument("--out", default=out, metavar="FOLDER", help="folder of the run folders and of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="N", help="one of each run a seed")
    parser.add_argument("--jobs", type=whole(1), default=1, metavar="N", help="trainings at once; each has cores / N "
        "threads")  # fmt: skip
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of the training script")


def parse_sweep(parser: ArgumentParser, *own: str) -> argparse.Namespace:
    """The flags of the command line. Raises UserError if a flag of the training script is in _OWN or in `own`: what the
    experiment itself decides for each run."""
    args = parser.parse_args()
    for word in args.flags:
        if word.partition("=")[0] in (*_OWN, *own):
            raise UserError(f"{word}: the experiment itself decides this for each run; leave it out behind --")
    return args


def add_script_flag(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--script", type=_script, default="train_fusion.py", metavar="FILE", help="or train_kinetics.py"
    )


def _script(name: str) -> Path:
    if not (ROOT / name).is_file():
        raise argparse.ArgumentTypeError(f"must be a training script in {ROOT}, got {name}")
    return ROOT / name


def add_variant_flag(parser: ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="variants of experiments/variants.py, or "
        '"name=flags" for others; not given: all of the file')  # fmt: skip


# ---- running ------------------------------------------------------------------------------------------


def sweep(
    out: Path, script: Path, flags: Sequence[str], variants: dict[str, Variant], cases: dict[str, tuple[str, ...]],
    jobs: int,
) -> int:  # fmt: skip
    """Train every variant in every case, and write the table. Returns the exit status.

    out: gets a folder `variant-case` for each run, and the table.
    flags: of every run, for the table's head.
    cases: name, without a hyphen, -> flags, such as a seed. The first case is trained in all variants, then the next:
        so there is a whole table early.
    """
    runs = {
        (name, case): Run(out / f"{name}-{case}", script, (*variant.flags, *case_flags))
        for case, case_flags in cases.items()
        for name, variant in variants.items()
    }
    every_run = f"`{shlex.join([*shlex.split(BASE), *flags])}`; ReSpike before these flags: `{RESPIKE}`"

    def table() -> str:
        return write_variants(out, every_run, {
            name: (variant, [runs[name, case] for case in cases]) for name, variant in variants.items()
        })  # fmt: skip

    status = run_all(list(runs.values()), jobs, table)
    print(table())
    return status


def run_all(runs: Sequence[Run], jobs: int, report: Callable[[], None]) -> int:
    """Do what is left of each run, `jobs` at a time, in order. Returns the exit status.

    report: called after each run that ends well.

    A run that fails is named, and the others go on; the status is then 1. Ctrl-C and SIGTERM are handed to the running
    trainings, which save a checkpoint; the status is then 130. Raises UserError if a folder holds a run with other
    flags.
    """
    for run in runs:
        run.check()
    waiting = [run for run in runs if run.next_command() is not None]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished", flush=True)
    running: list[_Process] = []
    failed = False
    with StopRequest() as stop:
        while running or (waiting and not stop.requested()):
            while waiting and len(running) < jobs and not stop.requested():
                run = waiting.pop(0)
                print(f"{run.name}: {'trains' if not run.finished() else 'is evaluated'}", flush=True)
                running.append(_Process(run, threads=max(1, cpu_count() // jobs)))
            for process in [process for process in running if process.ended()]:
                running.remove(process)
                run, left = process.run, process.run.next_command()
                if process.status or left == process.command:
                    if not stop.requested():
                        failed = True
                        print(_failure(run, process.status), flush=True)
                elif left is not None:
                    waiting.insert(0, run)
                else:
                    print(f"{run.name}: {run.top1():.1f} %, {run.seconds():.0f} s of training", flush=True)
                    report()
            if stop.requested():
                break
            time.sleep(_POLL_SECONDS)
        for process in running:
            process.popen.terminate()  # the training saves a checkpoint
        for process in running:
            process.ended(wait=True)
    if stop.requested():
        print("stopped; the same command goes on", flush=True)
        return 130
    return int(failed)


class _Process:
    """What a run is doing: its training, or evaluate.py. Notes in `run.times` what it took."""

    def __init__(self, run: Run, threads: int):
        self.run, self.command, self.status = run, run.next_command(), None
        self._training, self._start = not run.finished(), time.monotonic()
        with writing(run.log):
            run.log.parent.mkdir(parents=True, exist_ok=True)
            with open(run.log, "a") as log:
                # A session of its own: a terminal's Ctrl-C reaches it once, through this process.
                self.popen = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                )  # fmt: skip

    def ended(self, wait: bool = False) -> bool:
        """Whether it has ended; `status` is then its exit status."""
        # Popen's own wait would not tell the processor time. The kernel's sum has the children that it waited for.
        ended, status, used = os.wait4(self.popen.pid, 0 if wait else os.WNOHANG)
        if not ended:
            return False
        self.status = self.popen.returncode = os.waitstatus_to_exitcode(status)
        line = {
            "training": self._training, "status": self.status, "seconds": round(time.monotonic() - self._start, 2),
            "processor_seconds": round(used.ru_utime + used.ru_stime, 2),
        }  # fmt: skip
        with writing(self.run.times), open(self.run.times, "a") as file:
            file.write(json.dumps(line) + "\n")
        return True


def _failure(run: Run, status: int) -> str:
    lines = [line for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    ended = f"ended with status {status}" if status else "ended before its last epoch"
    return f"{run.name}: {ended}: {lines[-1] if lines else 'no output'} ({run.log})"


# ---- tables -------------------------------------------------------------------------------------------


def write_variants(out: Path, every_run: str, variants: dict[str, tuple[Variant, list[Run]]]) -> str:
    """The table of the runs that are finished: mean and deviation of a variant over its runs."""
    figures = {
        "video_top1": Run.top1, "energy_mj": Run.energy_mj, "core_minutes": Run.core_minutes,
        "seconds": Run.seconds,
    }  # fmt: skip
    titles = ["video top-1, %", "energy a clip, mJ", "training, core-minutes", "training, s"]
    markdown = [["variant", "changed", "runs", *titles]]
    table = [["variant", "changed", "runs", *(f"{name}_{part}" for name in figures for part in ("mean", "deviation"))]]
    for name, (variant, runs) in variants.items():
        finished = [run for run in runs if run.finished()]
        pairs = [
            mean_deviation([figure(run) for run in finished], 3 if name == "energy_mj" else 1)
            for name, figure in figures.items()
        ]
        markdown.append([
            name, f"`{variant.changed}`" if variant.changed else "", str(len(finished)),
            *(mean if deviation == "-" else f"{mean} ± {deviation}" for mean, deviation in pairs),
        ])  # fmt: skip
        table.append(
            [name, variant.changed, len(finished), *("" if text == "-" else text for pair in pairs for text in pair)]
        )
    return write_tables(out, every_run, markdown, table)


def mean_deviation(values: Sequence[float | None], digits: int = 1) -> tuple[str, str]:
    """(mean, sample standard deviation) as text; a dash for what cannot be computed."""
    known = [value for value in values if value is not None]
    return (
        f"{statistics.mean(known):.{digits}f}" if known else "-",
        f"{statistics.stdev(known):.{digits}f}" if len(known) > 1 else "-",
    )


def write_tables(folder: Path, every_run: str, markdown: list[list[str]], table: list[list]) -> str:
    """table.md, below the flags of every run, and table.csv in `folder`. The first row of each is its header. Returns
    the Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in markdown]
    lines.insert(1, "|---" * len(markdown[0]) + "|")
    text = f"Every run: {every_run}\n\n" + "".join(f"{line}\n" for line in lines)
    with writing(folder):
        write_atomically(folder / "table.md", text.encode())
        with open(folder / "table.csv", "w", newline="") as file:
            csv.writer(file).writerows(table)
    return text
