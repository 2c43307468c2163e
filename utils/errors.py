"""Errors that a user can mend: one exception, and the one table of what other libraries raise."""

import argparse
import re
from typing import NoReturn

import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: which file or flag, what was expected, what was
    found, what to do.

    about: the parameter that the message is about, if it is one. A script puts its flag of this name in front.
    """

    def __init__(self, message: str, about: str | None = None):
        super().__init__(message)
        self.about = about


class OtherProcessError(UserError):
    """Another process of this run cannot go on, and prints why."""

    def __init__(self):
        super().__init__("another process of this run cannot go on")


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with its complaint in one line and no guessing of abbreviated flags."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=_HelpWithDefaults, **settings)

    def error(self, message: str) -> NoReturn:
        # "argument -b/--batch-size: must be" -> "--batch-size must be"
        message = re.sub(r"^argument (?:\S*/)?(\S+): must", r"\1 must", message).removeprefix("argument ")
        raise UserError(f"{message} (--help lists the flags)")


# What PyTorch writes if a data loading process was killed, or if memory, disk or file descriptors ran out.
_RESOURCE_ERRORS = (
    "exited unexpectedly", "killed by signal", "shared memory", "unable to resize file", "allocate memory",
    "No space left", "Too many open files", "Connection reset",
)  # fmt: skip
# What gloo and NCCL write if the process at the other end is gone.
_PEER_LOST_ERRORS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")


def explain(error: BaseException) -> str | None:
    """The line for a user about an error that PyTorch raised, or None if it may be a fault of this code."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory ({first}); take a smaller -b, --accumulate makes up for it"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile failed ({first}); is a C++ compiler installed? Run without it"
    if dist.is_available() and dist.is_initialized() and not isinstance(error, OSError):
        if any(words in str(error) for words in (*_PEER_LOST_ERRORS, "remote process")):
            return "another process of this run has ended; what it printed tells why"
        if isinstance(error, dist.DistError):
            return first
    return None


def explain_loading(error: BaseException) -> UserError | None:
    """The UserError for an error that a DataLoader raised, or None if it may be a fault of this code."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    from_worker = str(error).startswith("Caught ")  # then the message is the worker's traceback
    if isinstance(error, UserError):
        return UserError(lines[-1].partition("Error: ")[2] or " ".join(lines)) if from_worker else error
    if isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _RESOURCE_ERRORS):
        reason = lines[-1] if from_worker else " ".join(lines)
        return UserError(f"a data loading process died ({reason}); fewer workers (-j), or more memory or /dev/shm")
    return None
