"""Checkpoints: written whole or not at all, read without running code, refused where they do not fit."""

import io
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import write_atomically

FORMAT = 1


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` to `path` atomically. Raises UserError where it cannot; what was there stays."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        kept = "the earlier one is untouched" if path.exists() else "there was none before"
        raise UserError(f"{path}: the checkpoint cannot be written ({error.strerror}); {kept}") from error


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError for one that is absent, damaged or not ours."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged or unsafe file
        raise UserError(
            f"{path}: not a readable checkpoint, it is damaged or was cut off ({type(error).__name__}); "
            "resume from another one or start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "model_settings" not in state:
        raise UserError(f"{path}: not a checkpoint of this project (format {FORMAT})")
    return state


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
