"""A function on many files, in several processes, whatever a file does to the process that reads it."""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch

from utils.signals import leave_signals_to_the_main_process

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result | None]]:
    """Yield (item, function(item)) in the order in which they are done; None for an item that killed its process.

    An item whose process was killed runs again at the end, alone in a process: memory may have been short. When the
    iterator is closed early, the processes are killed: what they are doing is not waited for. Raises what `function`
    raises.
    """
    again = []
    with contextlib.closing(_outcomes(function, items, workers)) as outcomes:
        for item, outcome in outcomes:
            if outcome is None:
                again.append(item)
            else:
                yield item, _result(outcome)
    for item in again:
        with contextlib.closing(_outcomes(function, [item], 1)) as outcomes:
            for _, outcome in outcomes:
                yield item, None if outcome is None else _result(outcome)


def _outcomes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, tuple[Result | None, Exception | None] | None]]:
    """(item, (result, error)); (item, None) if its process was killed."""
    # A pipe a process, and none of the queues of `concurrent.futures`: these need a /dev/shm to write to, and do not
    # tell which process had which item.
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    waiting = list(reversed(items))
    busy: dict[Connection, tuple[multiprocessing.Process, Item]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < max(1, workers):
                pipe, its_end = context.Pipe()
                process = context.Process(target=_serve, args=(function, its_end), daemon=True)
                process.start()
                its_end.close()  # the process alone holds it: what is read here ends when the process does
                _give(pipe, process, waiting.pop(), busy)
            for pipe in wait(list(busy)):
                process, item = busy.pop(pipe)
                try:
                    outcome = pipe.recv()
                except (EOFError, OSError):
                    outcome = None
                if outcome is not None and waiting:
                    _give(pipe, process, waiting.pop(), busy)
                else:
                    _end(process, pipe)
                yield item, outcome
    finally:
        for pipe, (process, _) in busy.items():
            _end(process, pipe)


def _give(pipe: Connection, process: multiprocessing.Process, item: Item, busy: dict) -> None:
    with contextlib.suppress(OSError):  # it was killed just now, which is found when it should answer
        pipe.send(item)
    busy[pipe] = process, item


def _end(process: multiprocessing.Process, pipe: Connection) -> None:
    process.kill()
    process.join()
    pipe.close()


def _serve(function: Callable[[Item], Result], pipe: Connection) -> None:
    """In a process: answer each item that is sent."""
    leave_signals_to_the_main_process()
    torch.set_num_threads(1)  # one process a core is the parallelism; and a forked pool of threads would hang
    with contextlib.suppress(EOFError):  # the main process has ended
        while True:
            item = pipe.recv()
            try:
                outcome = function(item), None
            except Exception as error:
                error.add_note(f"in a process of its own:\n{traceback.format_exc()}")
                outcome = None, error
            pipe.send(outcome)


def _result(outcome: tuple[Result | None, Exception | None]) -> Result:
    result, error = outcome
    if error is not None:
        raise error
    return result
