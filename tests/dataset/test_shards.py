import zlib
from argparse import ArgumentTypeError

import pytest

from dataset.shards import Shard, ShardResults, listing

NAMES = [f"class {number % 7}/video_{number}.mp4" for number in range(2000)] + ["\udcff.avi", "ü.avi"]


def test_every_video_is_in_one_shard():
    shards = [Shard(number, 16) for number in range(1, 17)]
    sizes = [sum(shard.has(name) for name in NAMES) for shard in shards]
    assert sum(sizes) == len(NAMES) and all(sum(shard.has(name) for shard in shards) == 1 for name in NAMES)
    assert min(sizes) > 80 and all(Shard(1, 1).has(name) for name in NAMES)


def test_each_shard_has_files_that_the_index_counts_and_decodes():
    """The index takes one in 50 by another hash of the name: were it the same, some shards would have none."""
    checked = [name for name in map(str, range(20_000)) if zlib.crc32(name.encode()) % 50 == 0]
    assert all(sum(Shard(number, 10).has(name) for name in checked) > 15 for number in range(1, 11))


@pytest.mark.parametrize("text", ["0/16", "17/16", "3", "3/", "a/b", "-1/4", "3/0", "1/99999", "1.0/2", "", "٣/٤ "])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(ArgumentTypeError, match=r"must be such as 3/16, the third of 16"):
        Shard.parse(text)


def test_the_value_of_the_flag():
    assert Shard.parse("3/16") == Shard(3, 16) and Shard.parse("1/1") == Shard(1, 1)


def test_a_listing_differs_for_other_videos():
    assert listing(NAMES) == listing(reversed(NAMES)) and listing(NAMES) != listing(NAMES[1:])
    assert listing(["a", "b"]) != listing(["a", "c"])


def test_results_count_when_all_shards_are_done_with_the_same_videos(tmp_path):
    first, second = (ShardResults(tmp_path, Shard(number, 2), "these") for number in (1, 2))
    assert first.begin() == {} and first.collect() == ({}, [1, 2])
    second.end({"b": [1, 2]})
    first.end({"a": "a: cannot be read"})
    assert first.collect() == second.collect() == ({"a": "a: cannot be read", "b": [1, 2]}, [])
    assert ShardResults(tmp_path, Shard(1, 2), "others").collect() == ({}, [1, 2])
    assert ShardResults(tmp_path, Shard(1, 3), "these").collect() == ({}, [1, 2, 3])
    assert second.begin() == {"b": [1, 2]} and first.collect()[1] == [2]  # at work again
    (first.own_folder / "done.json").write_text('{"listed": "these", "res')
    assert first.collect() == ({}, [1, 2])
