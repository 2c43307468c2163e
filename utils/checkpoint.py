"""Checkpoints: written whole or not at all, read without running code, refused where they do not fit."""

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import write_atomically

FORMAT = 2
LAST = "last.pt"  # the newest; last-1.pt is the one before, and so on


class CheckpointError(UserError):
    """A checkpoint that cannot be written."""


class DamagedCheckpointError(UserError):
    """A checkpoint that was cut off or has rotted."""


def save_checkpoint(path: Path, state: dict, keep: int = 1) -> None:
    """Write `state` to `path` atomically. Raises CheckpointError where it cannot; what was there stays.

    keep: of last.pt, how many to keep: the one that is there becomes last-1.pt, the one before that
    last-2.pt, ... once the new one is on the disk. Whenever the process is killed, a whole one is there."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    try:
        rotate = (lambda: _make_room(path.parent, keep)) if path.name == LAST else (lambda: None)
        write_atomically(path, buffer.getbuffer(), before_renaming=rotate)
    except OSError as error:
        kept = "the earlier one is untouched" if path.exists() else "there was none before"
        raise CheckpointError(f"{path}: the checkpoint cannot be written ({error.strerror}); {kept}") from error


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError for one that is absent or not ours, of the type
    DamagedCheckpointError for one that is damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        # torch.load compares no checksums; the file is a zip archive, which has them.
        with zipfile.ZipFile(path) as archive:
            rotten = archive.testzip()
        if rotten is not None:
            raise zipfile.BadZipFile(f"checksum of {rotten}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:  # not the file's fault: it may well be whole
        raise UserError(f"{path}: the checkpoint cannot be read ({error})") from error
    except Exception as error:  # torch.load raises many types for a damaged or unsafe file
        if "can't allocate memory" in str(error):  # PyTorch's MemoryError
            raise UserError(f"{path}: the checkpoint cannot be read (not enough memory)") from error
        raise DamagedCheckpointError(
            f"{path}: not a readable checkpoint, it is damaged or was cut off ({type(error).__name__}); "
            "resume from another one or start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "model_settings" not in state:
        raise UserError(f"{path}: not a checkpoint of this project (format {FORMAT})")
    return state


def load_newest(paths: Sequence[Path]) -> tuple[Path, dict] | None:
    """The first of `paths`, newest first, that is whole, and what it holds; None where there is none at all.

    A damaged one is said and set aside under another name, so that it takes no whole one's place. Raises
    UserError where all are damaged.
    """
    damaged: list[tuple[Path, UserError]] = []
    for path in paths:
        try:
            state = load_checkpoint(path)
        except DamagedCheckpointError as error:
            damaged.append((path, error))
            continue
        for broken, _ in damaged:
            aside = broken.with_suffix(".damaged")
            os.replace(broken, aside)
            print(f"note: {broken} is damaged or was cut off, kept as {aside.name}; going on from {path.name}")
        return path, state
    if damaged:
        raise damaged[0][1]
    return None


def find_checkpoint(resume: str | None, folder: Path, needed: bool = False) -> tuple[Path, dict] | None:
    """(path, content) of what --resume names: "auto" is the newest whole checkpoint of `folder`, and None
    where it has none, as for None. Raises UserError, also where there is none and one is `needed`.

    The content's "best" and "selection" are best.pt's where there is one beside it in `folder`: that may
    be newer than the checkpoint. Without it there is no best yet: its weights are gone."""
    if resume is None:
        return None
    found = load_newest(kept_checkpoints(folder)) if resume == "auto" else (Path(resume), load_checkpoint(Path(resume)))
    if found is None:
        if needed:
            raise UserError(f"--resume auto: no checkpoint in {folder}")
        print(f"--resume auto: no checkpoint in {folder}; starting anew")
        return None
    path, state = found
    best = folder / "best.pt"
    state["best"] = None
    if path.resolve().parent == folder.resolve() and best.exists():
        try:
            state |= {name: value for name, value in load_checkpoint(best).items() if name in ("best", "selection")}
        except DamagedCheckpointError as error:
            print(f"note: {error}")
    return found


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder to go on from, newest first: last.pt, last-1.pt, ..."""
    numbers = sorted(int(file.stem[5:]) for file in folder.glob("last-*.pt") if file.stem[5:].isdecimal())
    return [file for file in [folder / LAST, *(_earlier(folder, number) for number in numbers)] if file.exists()]


def _make_room(folder: Path, keep: int) -> None:
    last = folder / LAST
    begun = _earlier(folder, 1).exists() and last.exists() and os.path.samefile(last, _earlier(folder, 1))
    if last.exists() and not begun:  # begun: killed between this and the renaming of the new one
        for number in range(keep - 1, 1, -1):
            if _earlier(folder, number - 1).exists():
                os.replace(_earlier(folder, number - 1), _earlier(folder, number))
        if keep > 1:
            _link(last, _earlier(folder, 1))
    for file in kept_checkpoints(folder):
        if file != last and int(file.stem[5:]) >= keep:
            file.unlink()


def _earlier(folder: Path, number: int) -> Path:
    return folder / f"last-{number}.pt"


def _link(file: Path, name: Path) -> None:
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:  # a file system without links: for a moment there is last-1.pt only
        os.replace(file, name)
    else:
        os.replace(temporary, name)
        temporary.unlink(missing_ok=True)  # where both were names of one file, nothing was renamed


def check_settings(path: Path, found: dict, wanted: dict) -> None:
    """Raise UserError naming the first setting of a checkpoint's network that differs from this run's."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{path}: checkpoint of another network: its {name} is {_short(found.get(name))}, "
                f"this run's is {_short(value)}"
            )


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
