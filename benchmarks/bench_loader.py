"""Clips per second through the whole loader, by number of workers; what its time goes to; its memory.

    python -m benchmarks.bench_loader ../shared/clips/kinetics400
    python -m benchmarks.bench_loader ../shared/clips/kinetics400 --prepared 80 90 95 --workers 1
    python -m benchmarks.bench_loader ../shared/clips/hmdb51 ../shared/clips/ucf101 --memory

Decodes, crops (as train_kinetics.py does) and collates batches of --batch-size clips. "spread" takes a
frame of each of T segments, "contiguous" T frames in a row. The numbers of workers take turns in each
round; medians over the rounds. --prepared also measures the same files prepared by dataset.prepare at each of the
qualities, in turn with the originals, and prints their bytes a frame and their PSNR against the originals. --scaled
first makes copies of 340 x 256 pixels, as data sets are often
prepared, in a temporary folder, and measures these. --memory measures one worker over --clips clips.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy
import torch

import dataset.video
from dataset.batch_sampler import TrainBatchSampler
from dataset.clips import VideoTable, random_clips
from dataset.convert import Settings, convert, scaled_down
from dataset.decode import decode_frames
from dataset.frame_sampling import SegmentSampling, WindowSampling
from dataset.index import probe
from dataset.splits import VIDEO_SUFFIXES, VideoRecord
from dataset.transforms import multi_scale_crop
from dataset.video import VideoDataset, collate, make_loader
from utils.device import cpu_count


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, cpu_count()])
    parser.add_argument(
        "--prefetch", type=int, nargs="+", default=[2], metavar="BATCHES", help="loaded ahead by a worker"
    )
    parser.add_argument("-T", "--time", type=int, default=16, help="frames a clip")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("-b", "--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8, help="batches a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prepared", type=int, nargs="+", default=[], metavar="QUALITY")
    parser.add_argument("--scaled", action="store_true")
    parser.add_argument("--gop", type=int, default=50, help="frames from keyframe to keyframe of --scaled")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--clips", type=int, default=5000, help="clips of --memory")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        paths = [p for f in args.folders for p in sorted(f.rglob("*")) if p.suffix.lower() in VIDEO_SUFFIXES]
        if args.scaled:
            paths = [scaled_copy(path, Path(temporary) / f"{n}.mp4", args.gop) for n, path in enumerate(paths)]
        known = {str(path): probe(path) for path in paths}
        size = sum(path.stat().st_size for path in paths) / len(paths)
        print(
            f"{len(known)} files of {size / 1e6:.2f} MB on average: "
            + ", ".join(sorted({f"{i.width} x {i.height}" for i in known.values()}))
        )
        if args.memory:
            figures = measure_memory(known, args)
        else:
            kinds = {"originals": known}
            for quality in args.prepared:
                kinds[f"quality {quality}"] = prepare_copies(paths, Path(temporary) / f"quality{quality}", quality)
            figures = measure_rates(kinds, args)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "figures": figures}, indent=2, default=str))


def prepare_copies(paths: list[Path], folder: Path, quality: int) -> dict:
    """The files, prepared, and what is in them; prints what quality costs."""
    folder.mkdir()
    known, squares = {}, []
    for number, path in enumerate(paths):
        copy = folder / f"{number}.mov"
        convert(str(path), copy, Settings(quality=quality))
        known[str(copy)] = probe(copy)
        indices = range(0, known[str(copy)].frames, 20)
        pairs = zip(decode_frames(copy, indices), decode_frames(path, indices), strict=True)
        squares += [numpy.square(own - scaled_down(frame, 256).astype(float)).mean() for own, frame in pairs]
    size, frames = sum(Path(path).stat().st_size for path in known), sum(info.frames for info in known.values())
    print(
        f"quality {quality}: {size / frames / 1e3:.1f} KB a frame, {size / len(known) / 1e6:.2f} MB a file, "
        f"{size / sum(path.stat().st_size for path in paths):.1f} x the originals, "
        f"PSNR {10 * math.log10(255**2 / statistics.mean(squares)):.1f} dB"
    )
    return known


def measure_rates(kinds: dict[str, dict], args) -> list[dict]:
    figures = []
    for name, sampling in (("spread", SegmentSampling(args.time)), ("contiguous", WindowSampling(args.time))):
        loaders = {
            (kind, workers, prefetch): make(known, sampling, args, workers, prefetch=prefetch)
            for kind, known in kinds.items()
            for workers in args.workers
            for prefetch in args.prefetch
        }
        rates = {key: [] for key in loaders}
        for number in range(args.rounds + 1):
            for key, loader in loaders.items():
                start = time.perf_counter()
                clips = one_epoch(loader, number)
                if number > 0:  # the first starts the workers and fills the cache of files
                    rates[key].append(clips / (time.perf_counter() - start))
        for (kind, workers, prefetch), measured in rates.items():
            rate, first = statistics.median(measured), statistics.median(rates[kind, args.workers[0], prefetch])
            times = [a / b for a, b in zip(measured, rates["originals", workers, prefetch], strict=True)]
            print(
                f"{name:11s} {kind:11s} {workers:2d} workers, {prefetch} ahead: {rate:7.1f} clips/s "
                f"({min(measured):.1f} to {max(measured):.1f}), {rate / first:.2f} x {args.workers[0]} workers, "
                f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) x the originals"
            )
            figures.append(
                {"sampling": name, "files": kind, "workers": workers, "prefetch": prefetch, "clips_per_second": rate}
            )
        del loaders
        for kind, known in kinds.items():
            shares = stages(known, sampling, args)
            print(
                f"{name:11s} {kind:11s} in one process: "
                + ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in shares.items())
            )
            figures.append({"sampling": name, "files": kind, "shares": shares})
    return figures


def make(known: dict, sampling, args, workers: int, clips: int | None = None, prefetch: int = 2):
    """A loader of `clips` clips (--batches batches), the files again and again."""
    clips = clips or args.batches * args.batch_size
    paths = [list(known)[number % len(known)] for number in range(clips)]
    videos = VideoTable([VideoRecord(path, 0, "") for path in paths], [known[path] for path in paths])
    transforms = [multi_scale_crop(args.size, flip=True)]
    data = VideoDataset(videos, random_clips(videos), sampling, transforms, seed=0)
    return make_loader(data, TrainBatchSampler(clips, args.batch_size, seed=0), workers, pin=False, prefetch=prefetch)


def one_epoch(loader, epoch: int) -> int:
    loader.batch_sampler.set_position(epoch)
    clips = 0
    for batch in loader:
        assert not batch.failed, batch.failed
        clips += len(batch.labels)
    return clips


def stages(known: dict, sampling, args) -> dict[str, float]:
    """Share of the time in decoding, cropping and collating, measured in this process."""
    seconds = {"decode": 0.0, "crop and resize": 0.0, "collate": 0.0}

    def timed(stage, function):
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            seconds[stage] += time.perf_counter() - start
            return result

        return call

    loader = make(known, sampling, args, workers=0)
    loader.collate_fn = timed("collate", collate)
    loader.dataset._transforms = [timed("crop and resize", loader.dataset._transforms[0])]
    original = dataset.video.decode_frames
    dataset.video.decode_frames = timed("decode", original)
    try:
        start = time.perf_counter()
        one_epoch(loader, 0)
        total = time.perf_counter() - start
    finally:
        dataset.video.decode_frames = original
    shares = {stage: value / total for stage, value in seconds.items()}
    return {**shares, "the rest": 1 - sum(shares.values())}


def measure_memory(known: dict, args) -> list[dict]:
    """What one worker holds for itself (not shared with its parent) as it goes on."""
    loader = make(known, SegmentSampling(args.time), args, workers=1, clips=args.clips)
    figures, clips = [], 0
    every = max(1, args.clips // 10)
    for batch in loader:
        clips += len(batch.labels)
        if clips // every > (clips - len(batch.labels)) // every:
            (worker,) = loader._iterator._workers
            figures.append({"clips": clips, "private_mebibytes": private_bytes(worker.pid) / 2**20})
            print(f"{clips:6d} clips: {figures[-1]['private_mebibytes']:7.1f} MiB of its own", flush=True)
    return figures


def private_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def scaled_copy(path: Path, copy: Path, gop: int) -> Path:
    """340 x 256 pixels (256 x 340 upright), H.264, as preparation scripts make."""
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        incoming = source.streams.video[0]
        stream = target.add_stream("libx264", rate=incoming.average_rate or 25)
        stream.width, stream.height = (340, 256) if incoming.width >= incoming.height else (256, 340)
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for number, frame in enumerate(source.decode(incoming)):
            frame = frame.reformat(stream.width, stream.height, "yuv420p")
            frame.pts = number
            frame.time_base = 1 / stream.codec_context.framerate
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return copy


if __name__ == "__main__":
    main()
