"""Clips per second out of video files in one thread, beside torchcodec and decord where installed.

    python -m benchmarks.bench_decode ../shared/clips
    python -m benchmarks.bench_decode ../shared/clips --only kinetics400 --prepared

Reads 16-frame clips of every readable video under a folder: contiguous (a random window, as training
reads HMDB-51 and UCF-101) and spread (one frame in each of 16 segments). Every decoder gets the same
files and indices and opens the file anew for each clip, as a data loader's random access does;
decoders take turns, the figures are medians over rounds. "indexed" uses the seek points that
`dataset.index` caches once for a data set; "not indexed" decodes from the start. --prepared also reads the same
frames from copies that dataset.prepare makes, with decode_frames and with torchcodec; decode_frames on these copies
is then what the others are compared with.
"""

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy

from dataset.convert import Settings, convert
from dataset.decode import VideoError, decode_frames
from dataset.index import probe
from dataset.splits import VIDEO_SUFFIXES

CLIP_FRAMES = 16


def main() -> None:
    with contextlib.ExitStack() as stack:
        measure(stack)


def measure(stack: contextlib.ExitStack) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="videos, in any depth")
    parser.add_argument("--clips", type=int, default=4, help="clips a file and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prepared", action="store_true")
    parser.add_argument("--only", help="the videos of this folder alone, of those below `folder`")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    infos = readable(args.folder, args.only)
    decoders = available_decoders(infos)
    ours = "ours, indexed"
    if args.prepared:
        copies = prepared_copies(infos, stack)
        decoders |= {
            f"{name.split(',')[0]}, prepared": (on_copies(decode, copies), version)
            for name, (decode, version) in decoders.items()
            if name in ("ours, not indexed", "torchcodec")
        }
        ours = "ours, prepared"
    print(
        f"{len(infos)} videos, {CLIP_FRAMES}-frame clips, 1 thread, {args.clips} clips a file and round, "
        f"medians of {args.rounds} rounds"
    )
    for name, (_, version) in decoders.items():
        print(f"  {name}: {version}")
    figures = []
    for group, paths in groups(args.folder, infos).items():
        for sampling in ("contiguous", "spread"):
            seconds = {name: [] for name in decoders}
            failed = set()
            for round_number in range(args.rounds + 1):
                work = choose_clips(paths, infos, sampling, args.clips, random.Random(round_number))
                for name, (decode, _) in decoders.items():
                    elapsed = run(decode, work, failed, name)
                    if round_number > 0:
                        seconds[name].append(elapsed)
            clips = len(work)
            for name, times in seconds.items():
                if name in failed:
                    print(f"{group:12s} {sampling:11s} {name:20s} failed on some of these files")
                    continue
                rate = clips / statistics.median(times)
                ratio = statistics.median(b / a for a, b in zip(seconds[ours], times, strict=True))
                figures.append(
                    {
                        "group": group,
                        "sampling": sampling,
                        "decoder": name,
                        "clips_per_second": rate,
                        "ours_is_faster_by": ratio,
                    }
                )
                print(f"{group:12s} {sampling:11s} {name:20s} {rate:8.1f} clips/s   {ours} is {ratio:.2f}x as fast")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))


def prepared_copies(infos: dict, stack: contextlib.ExitStack) -> dict[Path, Path]:
    """A prepared copy of each video, in a folder that lives as long as the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    copies = {path: folder / f"{number}.mov" for number, path in enumerate(infos)}
    for path, copy in copies.items():
        convert(str(path), copy, Settings())
    return copies


def on_copies(decode, copies: dict[Path, Path]):
    return lambda path, indices: decode(copies[path], indices)


def readable(folder: Path, only: str | None) -> dict[Path, object]:
    infos = {}
    for path in sorted((folder / only if only else folder).rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            try:
                infos[path] = probe(path)
            except VideoError as error:
                print(f"left out: {error}")
    return {path: info for path, info in infos.items() if not info.damaged_packets}


def groups(folder: Path, infos: dict) -> dict[str, list[Path]]:
    """By the first folder below `folder`."""
    found: dict[str, list[Path]] = {}
    for path in infos:
        found.setdefault(path.relative_to(folder).parts[0], []).append(path)
    return found


def choose_clips(paths, infos, sampling: str, clips: int, generator: random.Random) -> list[tuple[Path, list[int]]]:
    work = []
    for path in paths:
        frames = infos[path].frames
        for _ in range(clips):
            if sampling == "contiguous":
                start = generator.randint(0, max(0, frames - CLIP_FRAMES))
                indices = [(start + step) % frames for step in range(CLIP_FRAMES)]
            else:
                indices = [int((step + generator.random()) * frames / CLIP_FRAMES) for step in range(CLIP_FRAMES)]
            work.append((path, indices))
    return work


def run(decode, work, failed: set, name: str) -> float:
    start = time.perf_counter()
    for path, indices in work:
        try:
            clip = decode(path, indices)
        except Exception as error:  # other decoders raise their own types
            if name not in failed:
                print(f"{name} fails on {path.name}: {str(error).splitlines()[0][:100]}")
            failed.add(name)
            continue
        assert clip.shape[0] == CLIP_FRAMES and clip.dtype == numpy.uint8
    return time.perf_counter() - start


def available_decoders(infos: dict) -> dict:
    import av

    decoders = {
        "ours, indexed": (
            lambda path, indices: decode_frames(path, indices, infos[path].seek_points),
            f"PyAV {av.__version__}",
        ),
        "ours, not indexed": (decode_frames, f"PyAV {av.__version__}"),
    }
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder

        def decode_torchcodec(path, indices):
            decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
            return decoder.get_frames_at(indices).data.numpy()

        decoders["torchcodec"] = (decode_torchcodec, torchcodec.__version__)
    except (ImportError, RuntimeError, OSError) as error:
        print(f"torchcodec: not measured ({str(error).strip().splitlines()[0]})")
    try:
        import decord

        decoders["decord"] = (
            lambda path, indices: decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy(),
            decord.__version__,
        )
    except (ImportError, OSError) as error:
        print(f"decord: not measured ({error})")
    return decoders


if __name__ == "__main__":
    main()
