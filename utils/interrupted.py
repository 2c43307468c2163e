"""Imported first of all by a script: the imports behind it take seconds, and Ctrl-C meanwhile is no traceback.

`utils.script.run_script` puts Python's own answer to Ctrl-C back.
"""

import os
import signal
import sys


def leave(number: int, frame) -> None:
    # Not an exception: libraries in C turn one into errors of their own. Nothing is there yet to be cleaned up.
    try:
        os.write(sys.stderr.fileno(), b"interrupted\n")
    finally:  # stderr may be closed
        os._exit(128 + number)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
    signal.signal(signal.SIGINT, leave)
