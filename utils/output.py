"""The stdout of a script, which may be lost: a full disk behind it, or a reader that has gone, such as `head`."""

from collections.abc import Callable
from typing import TextIO


class Output:
    """A text stream that remembers why it cannot be written.

    stream: where it writes to.
    error: the first error of a write; None as long as there is none.
    when_lost: takes that error, which is not raised then. Later writes do nothing.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.error: OSError | None = None
        self.when_lost: Callable[[OSError], None] | None = None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable, *arguments) -> None:
        if self.error is not None and self.when_lost is not None:
            return
        try:
            function(*arguments)
        except OSError as error:
            self.error = self.error or error
            if self.when_lost is None:
                raise
            self.when_lost(error)
