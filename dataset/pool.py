"""A function on many files, in several processes, whatever a file does to the process that reads it."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import torch

from utils.signals import leave_signals_to_the_main_process

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result | None]]:
    """Yield (item, function(item)) in the order in which they are done; None for an item that killed its process.

    An item that may have killed a process runs again, alone in a process. When the iterator is closed early, the
    processes are killed: what they are doing is not waited for.
    """
    suspects = []
    waiting = list(reversed(items))
    while waiting:
        with _processes(min(workers, len(waiting))) as pool:
            running: dict[Future, Item] = {}
            broken = False
            while (waiting or running) and not broken:
                while waiting and len(running) < 2 * workers:
                    try:
                        future = pool.submit(function, waiting[-1])
                    except BrokenProcessPool:
                        broken = True
                        break
                    running[future] = waiting.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    item = running.pop(future)
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        suspects.append(item)
                        broken = True
                    else:
                        yield item, result
            suspects.extend(running.values())
    for item in suspects:
        with _processes(1) as pool:
            try:
                result = pool.submit(function, item).result()
            except BrokenProcessPool:
                result = None
        yield item, result


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    with ProcessPoolExecutor(workers, context, _begin) as pool:
        try:
            yield pool
        except BaseException:
            for process in list((pool._processes or {}).values()):  # public (kill_workers) from Python 3.14 on
                process.kill()
            raise


def _begin() -> None:
    leave_signals_to_the_main_process()
    torch.set_num_threads(1)  # one process a core is the parallelism; and a forked pool of threads would hang
