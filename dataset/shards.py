"""A part of a data set for each job of an array: `--shard 3/16` does the third of sixteen parts."""

import hashlib
import json
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from utils.files import write_atomically, writing

SHARDS = ".shards"  # folder in a prepared one: what became of the videos of each shard
_MOST_SHARDS = 10_000


class Shard(NamedTuple):
    number: int  # from 1
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The value of --shard: "3/16" is the third of sixteen. Raises ArgumentTypeError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= _MOST_SHARDS:
            raise ArgumentTypeError(f"must be such as 3/16, the third of 16, from 1/16 to 16/16, got {text}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"  # as part of a file's name

    def has(self, name: str) -> bool:
        """Whether the video of this name is in the shard. It does not depend on the other videos: one that comes or
        goes leaves the others where they are."""
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.count == self.number - 1


def listing(names: Iterable[str]) -> str:
    """A short text that differs for other videos. All shards of a data set must have been given the same."""
    names = sorted(names)
    digest = hashlib.blake2b(os.fsencode("\0".join(names)), digest_size=8).hexdigest()
    return f"{len(names)} videos, {digest}"


class ShardResults:
    """What became of the videos of each shard, in folder/.shards, until all are done: a file for each shard, as shards
    that write to one file at a time would need locks, which not every file system has.

    listed: of `listing`; results of other videos do not count.
    """

    def __init__(self, folder: Path, shard: Shard, listed: str):
        self._folders = {n: folder / SHARDS / str(Shard(n, shard.count)) for n in range(1, shard.count + 1)}
        self.own_folder = self._folders[shard.number]
        self._listed = listed

    def begin(self) -> dict:
        """Name -> result, as an earlier start of this shard left it. From now on the shard is not done."""
        earlier = self._read(self.own_folder) or {}
        (self.own_folder / "done.json").unlink(missing_ok=True)
        return earlier

    def end(self, results: dict) -> None:
        """The shard is done. results: name -> anything that JSON can hold."""
        with writing(self.own_folder):
            self.own_folder.mkdir(parents=True, exist_ok=True)
            content = {"listed": self._listed, "results": results}
            write_atomically(self.own_folder / "done.json", json.dumps(content).encode())

    def collect(self) -> tuple[dict, list[int]]:
        """(name -> result of all shards that are done, the numbers of the others)."""
        found = {number: self._read(folder) for number, folder in self._folders.items()}
        together = {name: result for results in found.values() for name, result in (results or {}).items()}
        return together, [number for number, results in found.items() if results is None]

    def _read(self, folder: Path) -> dict | None:
        try:
            content = json.loads((folder / "done.json").read_bytes())
            return content["results"] if content["listed"] == self._listed else None
        except (OSError, ValueError, KeyError, TypeError):  # not done
            return None
