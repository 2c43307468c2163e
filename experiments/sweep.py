"""Many trainings, one run folder each: what the experiments share.

A sweep that was stopped or killed goes on with the same command. Finished runs are not trained again.
"""

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

from utils.device import cpu_count
from utils.errors import ArgumentParser, UserError
from utils.files import write_atomically, writing
from utils.signals import StopRequest
from utils.training.flags import whole

ROOT = Path(__file__).parents[1]
EVALUATE = ROOT / "evaluate.py"
_POLL_SECONDS = 0.2


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
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        lines = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line
        return [line for line in lines if "epoch" in line]

    def top1(self) -> float:
        """Video top-1 in percent: of the test if the run chose its best epoch on validation videos (--val-fraction),
        else of the last epoch. The best epoch on the test set itself would be an optimistic choice."""
        scored = _read(self.folder / "test.json") if self._validates() else self.metrics()[-1]
        return scored["video_top1"]

    def energy_mj(self) -> float | None:
        """Of one clip; None if the operations were not counted."""
        return _read(self.folder / "evaluation.json").get("energy", {}).get("total_mj")

    def seconds(self) -> float:
        """Spent on training, without tests and start."""
        return sum(line["train_clips"] / line["clips_per_second"] for line in self.metrics())

    def _config(self) -> dict:
        return _read(self.folder / "config.json")

    def _validates(self) -> bool:
        return self._config().get("flags", {}).get("val_fraction", 0) > 0


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def add_sweep_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="one of each run a seed")
    parser.add_argument("--jobs", type=whole(1), default=1, metavar="N", help="trainings at once; each has cores / N "
        "threads")  # fmt: skip


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
    running: dict[subprocess.Popen, tuple[Run, list[str]]] = {}
    failed = False
    with StopRequest() as stop:
        while running or (waiting and not stop.requested()):
            while waiting and len(running) < jobs and not stop.requested():
                run = waiting.pop(0)
                command = run.next_command()
                print(f"{run.name}: {'trains' if not run.finished() else 'is evaluated'}", flush=True)
                running[_start(run, command, jobs)] = run, command
            for process in [process for process in running if process.poll() is not None]:
                run, command = running.pop(process)
                left = run.next_command()
                if process.returncode or left == command:
                    if not stop.requested():
                        failed = True
                        print(_failure(run, process.returncode), flush=True)
                elif left is not None:
                    waiting.insert(0, run)
                else:
                    print(f"{run.name}: {run.top1():.1f} %, {run.seconds():.0f} s of training", flush=True)
                    report()
            if stop.requested():
                break
            time.sleep(_POLL_SECONDS)
        for process in running:
            process.terminate()  # the training saves a checkpoint
        for process in running:
            process.wait()
    if stop.requested():
        print("stopped; the same command goes on", flush=True)
        return 130
    return int(failed)


def _start(run: Run, command: list[str], jobs: int) -> subprocess.Popen:
    threads = {"OMP_NUM_THREADS": str(max(1, cpu_count() // jobs))}
    with writing(run.log):
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with open(run.log, "a") as log:
            # A session of its own: a terminal's Ctrl-C reaches it once, through this process.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **threads},
            )  # fmt: skip


def _failure(run: Run, status: int) -> str:
    lines = [line for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    ended = f"ended with status {status}" if status else "ended before its last epoch"
    return f"{run.name}: {ended}: {lines[-1] if lines else 'no output'} ({run.log})"


def mean_deviation(values: Sequence[float | None], digits: int = 1) -> tuple[str, str]:
    """(mean, sample standard deviation) as text; a dash for what cannot be computed."""
    known = [value for value in values if value is not None]
    return (
        f"{statistics.mean(known):.{digits}f}" if known else "-",
        f"{statistics.stdev(known):.{digits}f}" if len(known) > 1 else "-",
    )


def write_tables(folder: Path, flags: Sequence[str], markdown: list[list[str]], table: list[list]) -> str:
    """table.md, below the flags of every run, and table.csv in `folder`. The first row of each is its header. Returns
    the Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in markdown]
    lines.insert(1, "|---" * len(markdown[0]) + "|")
    text = f"Every run: `{shlex.join(flags)}`\n\n" + "".join(f"{line}\n" for line in lines)
    with writing(folder):
        write_atomically(folder / "table.md", text.encode())
        with open(folder / "table.csv", "w", newline="") as file:
            csv.writer(file).writerows(table)
    return text
