"""The one exception for what a user can mend, and the frame that turns it into one line."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: what it is about, what was
    expected, what was found, what to do."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit with what it returns; a `UserError` becomes one line and status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
