"""Which process gets which clip, in which order."""

from itertools import chain

import numpy
import pytest

from dataset.batch_sampler import EvalBatchSampler, TrainBatchSampler
from dataset.clips import CLIP


def flat(batches):
    return list(chain.from_iterable(batches))


def epoch(clips, batch_size, processes=1, epoch=0, done=0, seed=7):
    """[process][batch] -> clips"""
    result = []
    for rank in range(processes):
        batches = TrainBatchSampler(clips, batch_size, seed, rank, processes)
        batches.set_position(epoch, done)
        result.append([[clip for _, clip in batch] for batch in batches])
        assert len(result[-1]) == len(batches) == len(batches.sizes())
    return result


def test_every_clip_once_in_an_order_of_its_own_each_epoch():
    orders = {tuple(flat(epoch(20, 3, epoch=number)[0])) for number in range(3)}
    orders.add(tuple(flat(epoch(20, 3, seed=8)[0])))
    assert len(orders) == 4 and all(sorted(order) == list(range(20)) for order in orders)
    assert epoch(20, 3) == epoch(20, 3)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_one_order(processes):
    """A step of W processes takes what a step of one with a W times larger batch takes."""
    shared, whole = epoch(31, 4, processes), epoch(31, 4 * processes)[0]
    for step, clips in enumerate(whole):
        parts = [own[step] for own in shared]
        assert flat(parts) == clips
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_fewer_clips_than_processes_are_left_out():
    shared = epoch(13, 4, 3)  # one step of 12, one clip left
    assert [len(own) for own in shared] == [1, 1, 1] and sum(len(own[0]) for own in shared) == 12
    assert [[len(batch) for batch in own] for own in epoch(15, 4, 3)] == [[4, 1]] * 3


@pytest.mark.parametrize("clips, sizes", [(4, [4]), (12, [12]), (13, [13]), (25, [12, 13]), (40, [15, 16])])
def test_the_first_clips_of_an_epoch_in_even_batches(clips, sizes):
    """The same ones in 1, 2 and 3 processes, none of which goes without."""
    order = epoch(31, 12, epoch=5)[0]
    for processes in (1, 2, 3):
        parts = []
        for rank in range(processes):
            batches = TrainBatchSampler(31, 12 // processes, 7, rank, processes)
            batches.set_first(5, clips)
            assert batches.sizes() == sizes
            parts.append([[clip for _, clip in batch] for batch in batches])
            assert all(parts[-1])
            batches.set_position(5)
            assert sum(batches.sizes()) == 31
        assert flat(flat(own[step] for own in parts) for step in range(len(sizes))) == flat(order)[:clips]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_going_on_from_a_position(processes, steps):
    whole = epoch(31, 4, processes, epoch=5)
    rest = epoch(31, 4, processes, epoch=5, done=steps * 4 * processes)
    assert rest == [own[steps:] for own in whole]
    batches = TrainBatchSampler(31, 4, 7, 0, processes)
    batches.set_position(5, steps * 4 * processes)


def test_going_on_with_another_number_of_processes_or_batch():
    """What is left of the epoch is the same clips, each once."""
    first, rest = epoch(31, 4, 2)[0:2], epoch(31, 5, 1, done=16)
    done = flat(own[step] for step in range(2) for own in first)
    assert sorted(done + flat(rest[0])) == list(range(31))


def test_sizes_cover_what_is_left():
    batches = TrainBatchSampler(31, 4, 0, 1, 2)
    assert batches.sizes() == [8, 8, 8, 7]
    batches.set_position(0, 31)
    assert batches.sizes() == [] and len(batches) == 0


@pytest.mark.parametrize("videos", [7, 101])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("clips_each", [1, 6])
def test_testing_deals_out_whole_videos_without_padding(videos, processes, clips_each):
    clips = numpy.array([(video, place, 0) for video in range(videos) for place in range(clips_each)], CLIP)
    seen, owners = [], {}
    for rank in range(processes):
        batches = EvalBatchSampler(clips, 4, rank, processes)
        own = [clip for batch in batches for _, clip in batch]
        assert len(list(batches)) == len(batches) <= batches.steps
        for clip in own:
            owners.setdefault(int(clips["video"][clip]), set()).add(rank)
        seen += own
    assert sorted(seen) == list(range(len(clips)))
    assert all(len(ranks) == 1 for ranks in owners.values())


def test_more_processes_than_videos():
    clips = numpy.array([(0, 0, 0), (1, 0, 0)], CLIP)
    lengths = [len(EvalBatchSampler(clips, 4, rank, 3)) for rank in range(3)]
    assert lengths == [1, 1, 0] and EvalBatchSampler(clips, 4, 2, 3).steps == 1
