"""Damage prepared videos in many ways; each must give its frames or one clear line.

    python -m tests.helpers.damaged_files ../shared/clips/kinetics400/demo.mp4 --files 200

Prints how many gave all frames, and how many gave a line. Ends with status 1 if one gave a wrong frame, another
error, or took longer than ten seconds, or killed its process.
"""

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy

from dataset.convert import Settings, convert
from dataset.decode import VideoError, decode_frames
from dataset.index import probe
from dataset.pool import map_in_processes

KINDS = ("bytes", "bytes of the index", "cut", "positions", "sizes", "order", "zeros")


def damaged(content: bytes, kind: str, generator: random.Random) -> bytes:
    """The content of a prepared file, damaged. "positions", "sizes" and "order" change entries of its index."""
    data = bytearray(content)
    moov = data.rindex(b"moov") - 4
    if kind == "bytes":
        for _ in range(generator.choice((1, 10, 100))):
            data[generator.randrange(len(data))] = generator.randrange(256)
    elif kind == "bytes of the index":
        for _ in range(generator.choice((1, 3, 10))):
            data[generator.randrange(moov, len(data))] = generator.randrange(256)
    elif kind == "cut":
        del data[generator.randrange(len(data)) :]
    elif kind == "zeros":  # a hole of a download
        begin = generator.randrange(len(data))
        end = min(len(data), begin + generator.randrange(1, 50_000))
        data[begin:end] = bytes(end - begin)
    else:
        one_chunk = data[data.index(b"stco", moov) + 8 :][:4] == b"\0\0\0\1"
        box, first = (b"stsz", 16) if kind == "sizes" or (kind == "order" and one_chunk) else (b"stco", 12)
        begin = data.index(box, moov) + first
        count = int.from_bytes(data[begin - 4 : begin], "big")
        entries = [data[begin + 4 * n : begin + 4 * n + 4] for n in range(count)]
        if kind == "order":
            n, m = generator.sample(range(count), 2)
            entries[n], entries[m] = entries[m], entries[n]
        else:
            n = generator.randrange(count)
            value = generator.choice((0, 1, len(data) - 3, len(data) + 7, 2**31, 2**32 - 1, generator.randrange(2**32)))
            entries[n] = value.to_bytes(4, "big")
        data[begin : begin + 4 * count] = b"".join(entries)
    return bytes(data)


def verdict(path: str, frames: numpy.ndarray) -> str:
    """What reading the file gives: "right", a line (with "line: " before it), or what is wrong."""
    signal.alarm(10)  # a hang ends the process
    try:
        return _verdict(path, frames)
    finally:
        signal.alarm(0)


def _verdict(path: str, frames: numpy.ndarray) -> str:
    lines = []
    try:
        info = probe(path)
        if (info.frames, info.height, info.width) != frames.shape[:3]:
            return f"WRONG: probe found {info}"
    except VideoError as error:
        lines.append(str(error))
    for index in range(len(frames)):
        try:
            if not numpy.array_equal(decode_frames(path, [index])[0], frames[index]):
                return f"WRONG: frame {index}"
        except VideoError as error:
            lines.append(str(error))
        except Exception as error:
            return f"WRONG: {type(error).__name__}: {error}"
    if any("\n" in line or path not in line for line in lines):
        return f"WRONG: not one line with the file's name: {lines}"
    return f"line: {lines[0]}" if lines else "right"


def verdicts(folder: Path, source: Path, files: int, seed: int) -> list[tuple[str, str]]:
    """(kind of damage, verdict) of so many damaged copies of a prepared file, written to the folder."""
    frames = decode_frames(source, range(probe(source).frames))
    content = source.read_bytes()
    kinds = {}
    for number in range(files):
        path = folder / f"{number}.mov"
        kinds[str(path)] = KINDS[number % len(KINDS)]
        path.write_bytes(damaged(content, kinds[str(path)], random.Random(f"{seed}/{number}")))
    found = map_in_processes(partial(verdict, frames=frames), list(kinds), 2)
    return [(kinds[path], result or "WRONG: killed its process") for path, result in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "whole.mov"
        convert(str(args.video), source, Settings(short_side=96))
        counts = Counter()
        for kind, found in verdicts(Path(folder), source, args.files, args.seed):
            counts[kind, found.split(":")[0]] += 1
            if found.startswith("WRONG"):
                print(f"{kind}: {found}")
        for (kind, found), count in sorted(counts.items()):
            print(f"{kind}: {found}: {count}")
    sys.exit(any(found == "WRONG" for _, found in counts))


if __name__ == "__main__":
    main()
