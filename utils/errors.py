"""The one exception for what a user can mend."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: what it is about, what was
    expected, what was found, what to do."""


class OtherProcessError(UserError):
    """Another process of this run cannot go on, and says why."""


class LocalError(Exception):
    """What would be a UserError, in a process that cannot tell the others: they notice when it is gone."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with its complaint in one line and no guessing of abbreviated flags."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def worker_error(error: UserError) -> UserError:
    """A `UserError` raised in a DataLoader's worker comes wrapped in its traceback: its own line again."""
    message = str(error)
    if not message.startswith("Caught "):
        return error
    lines = message.strip().splitlines()
    return UserError(lines[-1].partition("Error: ")[2] or " ".join(lines))
