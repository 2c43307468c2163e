"""Checkpoints: written whole or not at all, read without running code, refused if they do not fit."""

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from utils.errors import UserError
from utils.files import write_atomically

FORMAT = 2
# Checkpoints from before these were settings and flags were trained with them.
EARLIER_SETTINGS = {
    "network": "ReSpike", "residual": "key", "neuron": "lif", "neuron_args": {}, "tau": 4 / 3, "surrogate": "atan",
    "alpha": 2.0,
}  # fmt: skip
EARLIER_FLAGS = {
    **EARLIER_SETTINGS, "momentum": 0.9, "sampling": "window", "crops": 1, "flip": None, "val_fraction": 0.0,
    "freeze": None, "precise_bn": 0, "neuron_args": None,
}  # fmt: skip
LAST = "last.pt"  # the newest; last-1.pt is the one before, and so on


class Checkpoint(NamedTuple):
    path: Path
    state: dict  # what `save_checkpoint` was given

    @property
    def classes(self) -> list[str]:
        return self.state["model_settings"]["classes"]


class CheckpointError(UserError):
    """A checkpoint that cannot be written."""


class DamagedCheckpointError(UserError):
    """A checkpoint that is truncated or corrupt."""


def save_checkpoint(path: Path, state: dict, keep: int = 1) -> None:
    """Write `state` to `path` atomically. Raises CheckpointError if it cannot; the earlier file stays then.

    keep: how many last*.pt to keep. Once the new file is on the disk, last.pt becomes last-1.pt, the file before
    that last-2.pt, and so on. Whenever the process is killed, a whole checkpoint is there."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    rotate = (lambda: _make_room(path.parent, keep)) if path.name == LAST else (lambda: None)
    try:
        # Released even if it fails: Python 3.12.1 crashes when it collects an error whose traceback holds a memoryview.
        with buffer.getbuffer() as content:
            write_atomically(path, content, before_renaming=rotate)
    except OSError as error:
        kept = "the earlier one is untouched" if path.exists() else "there was none before"
        raise CheckpointError(f"{path}: the checkpoint cannot be written ({error.strerror}); {kept}") from error


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError if it is absent or not of this project, and
    DamagedCheckpointError if it is damaged."""
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder; name a checkpoint in it, or continue it with --run-dir and --resume auto"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        # torch.load compares no checksums; the file is a zip archive, which has them.
        with zipfile.ZipFile(path) as archive:
            rotten = archive.testzip()
        if rotten is not None:
            raise zipfile.BadZipFile(f"checksum of {rotten}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:  # the file itself may be whole
        raise UserError(f"{path}: the checkpoint cannot be read ({error})") from error
    except Exception as error:  # torch.load raises many types for a damaged or unsafe file
        if "can't allocate memory" in str(error):  # how PyTorch reports it
            raise UserError(f"{path}: the checkpoint cannot be read (not enough memory)") from error
        raise DamagedCheckpointError(
            f"{path}: not a readable checkpoint, it is damaged or was cut off ({type(error).__name__}); "
            "resume from another one or start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "model_settings" not in state:
        raise UserError(f"{path}: not a checkpoint of this project (format {FORMAT})")
    return state


def load_newest(paths: Sequence[Path]) -> Checkpoint | None:
    """The first whole checkpoint of `paths`, which stand newest first; None if there are no paths.

    A damaged checkpoint is reported and renamed to *.damaged, so that it does not take the place of a whole one.
    Raises UserError if all are damaged.
    """
    damaged: list[DamagedCheckpointError] = []
    for path in paths:
        try:
            state = load_checkpoint(path)
        except DamagedCheckpointError as error:
            damaged.append(error)
            continue
        for broken in paths[: len(damaged)]:
            aside = broken.with_suffix(".damaged")
            os.replace(broken, aside)
            print(f"note: {broken} is damaged or was cut off, kept as {aside.name}; continuing from {path.name}")
        return Checkpoint(path, state)
    if damaged:
        raise damaged[0]
    return None


def find_checkpoint(resume: str | None, folder: Path, needed: bool = False) -> Checkpoint | None:
    """What --resume names. "auto" is the newest whole checkpoint of `folder`, or None if there is none, unless one is
    `needed`. Raises UserError.

    "best" and "selection" of the state are taken from best.pt in `folder`, which may be newer than the checkpoint.
    Without best.pt there is no best epoch yet: its weights are gone."""
    if resume is None:
        return None
    if resume == "auto":
        found = load_newest(kept_checkpoints(folder))
    else:
        found = Checkpoint(Path(resume), load_checkpoint(Path(resume)))
    if found is None:
        if needed:
            raise UserError(f"--resume auto: no checkpoint in {folder}")
        print(f"--resume auto: no checkpoint in {folder}; starting anew")
        return None
    best = folder / "best.pt"
    found.state["best"] = None
    if found.path.resolve().parent == folder.resolve() and best.exists():
        try:
            newer = load_checkpoint(best)
            selection = found.state.get("selection")
            found.state.update({name: newer[name] for name in ("best", "selection") if name in newer})
            # best.pt may be from before labels were kept, and the run was continued since: it knows the labels then.
            if selection and selection.startswith(found.state["selection"]):
                found.state["selection"] = selection
        except DamagedCheckpointError as error:
            print(f"note: {error}")
    return found


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder to continue from, newest first: last.pt, last-1.pt, ..."""
    numbers = sorted(int(file.stem[5:]) for file in folder.glob("last-*.pt") if file.stem[5:].isdecimal())
    return [file for file in [folder / LAST, *(_earlier(folder, number) for number in numbers)] if file.exists()]


def _make_room(folder: Path, keep: int) -> None:
    last = folder / LAST
    if last.exists():  # if not, the process was killed between here and the renaming of the new file
        for number in range(keep - 1, 0, -1):
            newer = _earlier(folder, number - 1) if number > 1 else last
            if newer.exists():
                os.replace(newer, _earlier(folder, number))
    for file in kept_checkpoints(folder):
        if file != last and int(file.stem[5:]) >= keep:
            file.unlink()


def _earlier(folder: Path, number: int) -> Path:
    return folder / f"last-{number}.pt"


def check_settings(path: Path, found: dict, wanted: dict) -> None:
    """Raise UserError naming the first setting of a checkpoint's network that differs from this run's."""
    for name, value in wanted.items():
        if found.get(name) != value:
            its, ours = (text if len(text) <= 60 else f"{text[:57]}..." for text in (str(found.get(name)), str(value)))
            raise UserError(f"{path}: checkpoint of another network: its {name} is {its}, this run's is {ours}")
