"""A function in several processes, some of which die."""

import errno
import functools
import gc
import multiprocessing
import os
import time
from fractions import Fraction

import av
import pytest

from dataset.pool import map_in_processes


@pytest.fixture(autouse=True)
def without_semaphores(monkeypatch):
    """As where /dev/shm cannot be written: nothing here needs one."""

    def refuse(self, *arguments, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    with pytest.raises(OSError, match="Read-only"):
        multiprocessing.get_context("fork").Lock()


def work(item: int, folder: str = "") -> tuple[int, int]:
    """(ten times the item, the process); 3 always kills its process, 5 at its first try."""
    if item == 3 or (item == 5 and not os.path.exists(f"{folder}/tried")):
        open(f"{folder}/tried", "w").close()
        os.kill(os.getpid(), 9)
    return 10 * item, os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_every_item_is_answered_once(tmp_path, workers):
    found = list(map_in_processes(functools.partial(work, folder=tmp_path), range(6, 40), workers))
    assert sorted(item for item, _ in found) == list(range(6, 40))
    assert all(result[0] == 10 * item for item, result in found)
    assert len({process for _, (_, process) in found}) <= workers and os.getpid() not in {p for _, (_, p) in found}


def test_an_item_that_kills_its_process_is_tried_again_and_named(tmp_path):
    found = dict(map_in_processes(functools.partial(work, folder=tmp_path), range(10), 2))
    assert sorted(found) == list(range(10)) and found[3] is None
    assert all(found[item][0] == 10 * item for item in range(10) if item != 3)


def fail(item: int) -> int:
    raise ValueError(f"item {item}")


def test_an_error_is_raised_with_the_place_it_comes_from():
    with pytest.raises(ValueError, match="item 4") as caught:
        list(map_in_processes(fail, [4], 1))
    assert any("in fail" in note for note in caught.value.__notes__)
    assert not multiprocessing.active_children()


def test_closing_early_does_not_wait_for_what_is_under_way():
    results = map_in_processes(time.sleep, [0, 600, 600], 2)
    assert next(results) == (0, None)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 10 and not multiprocessing.active_children()


def test_no_items():
    assert list(map_in_processes(fail, [], 4)) == []


def test_a_codec_with_threads_that_is_garbage_does_not_stop_a_forked_process():
    codec = av.CodecContext.create("mpeg4", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 64, 64, "yuv420p", Fraction(1, 25)
    codec.thread_type, codec.thread_count = "SLICE", 2
    codec.encode(av.VideoFrame(64, 64, "yuv420p"))
    garbage = [codec]
    garbage.append(garbage)
    gc.disable()  # so that it is still there in the forked process
    try:
        del codec, garbage
        process = multiprocessing.get_context("fork").Process(target=gc.collect, daemon=True)
        process.start()
        process.join(20)
        ended = process.exitcode
        process.kill()
    finally:
        gc.enable()
    assert ended == 0
