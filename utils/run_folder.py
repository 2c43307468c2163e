"""The folder of one run: configuration, metrics, checkpoints, TensorBoard, lists of files left out."""

import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.checkpoint import LAST, kept_checkpoints
from utils.errors import UserError
from utils.files import write_atomically, writing
from utils.lock import lock

_locked: dict[Path, int] = {}  # folder -> its lock file, open
_PACKAGES = ("torch", "torchvision", "triton", "spikingjelly", "av", "numpy")


def continues_run(resume: str | None, run_dir: str, test_only: bool) -> bool:
    """Whether the run of the folder continues (--resume auto, or one of its checkpoints) or is only tested."""
    return resume is not None and (
        test_only or resume == "auto" or Path(resume).resolve().parent == Path(run_dir).resolve()
    )


class RunFolder:
    """What a run writes; only rank 0 uses it. Creates `path`. A folder that holds a run is opened only to continue it,
    or with `overwrite`: `begin` then removes the old run, after data and network were set up without an error."""

    def __init__(self, path: Path, resuming: bool, overwrite: bool):
        self.path = path
        self.last = path / LAST
        self.best = path / "best.pt"
        self._metrics = path / "metrics.jsonl"
        self._steps = path / "steps.jsonl"
        with writing(path, "; name a writable folder", about="run_dir"):
            path.mkdir(parents=True, exist_ok=True)
            if path not in _locked:
                _locked[path] = lock(path / ".lock", about="run_dir")
        for leftover in path.glob(".*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
        earlier = [file for file in (*kept_checkpoints(path), self.best, self._metrics) if file.exists()]
        if earlier and not resuming and not overwrite:
            raise UserError(
                f"{path}: holds a run already ({earlier[0].name}); continue it with --resume auto, replace it with "
                "--overwrite, or name another folder",
                about="run_dir",
            )
        if earlier and not resuming and not (path / "config.json").exists():
            raise UserError(
                f"{path}: holds {earlier[0].name} but no config.json, so it is not a run of this project and is not "
                "overwritten; name another folder",
                about="run_dir",
            )
        self._replace = not resuming
        self._writers: dict[Path, SummaryWriter] = {}
        self._first = (0, 0)  # epoch, and clips of the epoch, that this start begins with

    def begin(self, epoch: int, clips: int = 0) -> None:
        """Make room for a run that starts with clip `clips` of `epoch`: remove an earlier run, or the lines of what
        a resumed run is about to do again."""
        self._first = (epoch, clips)
        if self._replace:
            names = ("best.pt", "metrics.jsonl", "steps.jsonl", "test*.json", "broken.txt", "last*.damaged")
            found = [self.path.glob(name) for name in (*names, "events.out.tfevents.*", "steps/events.out.tfevents.*")]
            for file in itertools.chain(kept_checkpoints(self.path), *found):
                file.unlink()
            return
        for file, start in ((self._metrics, (epoch, 0)), (self._steps, (epoch, clips + 1))):
            if file.exists():
                lines = [line for line in file.read_text().splitlines() if _position_of(line) < start]
                self._write(file.name, "".join(f"{line}\n" for line in lines))

    def has_events(self) -> bool:
        """Whether TensorBoard was written to already, in this start or an earlier one."""
        return any(self.path.glob("events.out.tfevents.*"))

    def write_config(self, flags: dict, **more) -> None:
        """config.json: every flag, the versions it ran with and the commit it ran from."""
        config = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "flags": flags, **more, **described_code()}
        self._write("config.json", json.dumps(config, indent=2, default=str) + "\n")

    def write_list(self, name: str, lines: Sequence[str]) -> Path:
        """A text file of one item a line, such as the videos left out; no file if there are none."""
        if lines:
            self._write(name, "".join(f"{line}\n" for line in lines))
        else:
            (self.path / name).unlink(missing_ok=True)
        return self.path / name

    def add_to_list(self, name: str, lines: Sequence[str]) -> None:
        """More lines at the end of a list of an earlier start or step."""
        if not lines:
            return
        file = self.path / name
        # Not `splitlines`: a name may hold U+2028 and others that end lines elsewhere.
        earlier = file.read_text(errors="surrogateescape").rstrip("\n").split("\n") if file.exists() else []
        self.write_list(name, list(dict.fromkeys([*earlier, *lines])))

    def write_result(self, result: dict) -> None:
        """test.json: the test set's score. A score after other epochs that stood there is kept beside it."""
        file = self.path / "test.json"
        before = json.loads(file.read_text()).get("after_epochs") if file.exists() else None
        if before not in (None, result.get("after_epochs")):
            kept = file.rename(self.path / f"test-after-{before}.json")
            print(f"note: the test after {before} epochs is kept as {kept.name}")
        self._write("test.json", json.dumps(result, indent=2) + "\n")

    def add_picture(self, name: str, picture: Tensor, step: int = 0) -> None:
        """picture [3, H, W] in [0, 1], to TensorBoard."""
        with writing(self.path):
            self._writer(self.path, self._first[0]).add_image(name, picture, step)

    def add_metrics(self, metrics: dict) -> None:
        """A line of metrics.jsonl, and the same numbers to TensorBoard at step `metrics["epoch"]`."""
        self._add_line(self._metrics, metrics, self._writer(self.path, self._first[0]), metrics["epoch"])

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, one an epoch."""
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def add_closing(self, values: dict) -> None:
        """The last line of metrics.jsonl, about the whole run. It has no "epoch", so a continued run removes it."""
        with writing(self._metrics), open(self._metrics, "a") as file:
            file.write(json.dumps(values, default=float) + "\n")

    def add_step(self, values: dict, clips_per_epoch: int) -> None:
        """A line of steps.jsonl, and the same numbers to TensorBoard (steps/) at the clips trained on so far.
        values: "epoch", "clips" of the epoch that were done, and scalars."""
        (first_epoch, first_clip), epoch = self._first, values["epoch"]
        # A writer of its own: TensorBoard hides what lies behind the step that a continued run begins with.
        writer = self._writer(self.path / "steps", first_epoch * clips_per_epoch + first_clip + 1)
        self._add_line(self._steps, values, writer, epoch * clips_per_epoch + values["clips"])

    def _add_line(self, file: Path, values: dict, writer: SummaryWriter, at: int) -> None:
        with writing(file):
            with open(file, "a") as opened:
                opened.write(json.dumps(values, default=float) + "\n")  # a tensor of one number is its number
                opened.flush()
                if file == self._metrics:
                    os.fsync(opened.fileno())
            for name, value in values.items():
                for tag, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, int | float | Tensor) and name not in ("epoch", "clips"):
                        writer.add_scalar(f"{name}/{tag}" if tag else name, number, at)
            writer.flush()

    def _writer(self, folder: Path, first: int) -> SummaryWriter:
        """Of TensorBoard events from step `first` on."""
        if folder not in self._writers:
            threading.excepthook = _leave_disk_errors_to_the_main_thread
            with writing(folder):
                self._writers[folder] = SummaryWriter(str(folder), purge_step=first)
        return self._writers[folder]

    def close(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # all that matters is written already
                writer.close()

    def _write(self, name: str, text: str) -> None:
        with writing(self.path / name):
            write_atomically(self.path / name, text.encode(errors="surrogateescape"))


def _leave_disk_errors_to_the_main_thread(details: threading.ExceptHookArgs) -> None:
    # TensorBoard's writing thread prints its traceback and hands the error to the next call as well.
    if not issubclass(details.exc_type, OSError):
        threading.__excepthook__(details)


def leave_run_folders() -> None:
    """Let other processes use the folders that this process has opened."""
    while _locked:
        os.close(_locked.popitem()[1])


def _position_of(line: str) -> tuple[float, float]:
    try:
        values = json.loads(line)
        return values["epoch"], values.get("clips", 0)
    except (ValueError, KeyError):  # a line cut off when the run was killed
        return float("inf"), 0


def described_code() -> dict:
    """The versions that this process runs with, and the commit of this project."""
    versions = {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}}
    return {"versions": versions, "git_commit": _git_commit()}


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
