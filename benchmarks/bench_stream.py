"""Frames a second of a stream, against the whole clip computed again for each new frame.

    python -m benchmarks.bench_stream ../shared/clips/kinetics400/demo.mp4

Random weights, through a file as `predict.py` reads it. Both ways take turns, a segment of the stream and one clip a
round. The ratio is of processor time, without decoding and cropping. Beside it are the frames a second of the whole
stream, by the clock.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench_step import describe
from dataset.live import frames_of
from dataset.residual import key_residual_split
from models import ReSpike
from models.respike import SETTINGS
from utils.device import choose_precision
from utils.prediction.clips import Clips
from utils.prediction.frames import FrameByFrame
from utils.runtime import Runtime
from utils.trained import TrainedNetwork, export


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("-T", "--time", type=int, default=16, help="frames a clip")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--fusion", default="cross")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="as predict.py has it")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds; one more warms up")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    model = exported(args)
    cpu = torch.device("cpu")
    runtime = Runtime(cpu, choose_precision(cpu, args.amp))
    shown, centre = FrameByFrame(model, runtime), Clips(model.trained).centre
    frames = iter(frames_of(args.video))
    rounds, whole = [], []
    for counted in range(-1, args.rounds):
        started, busy, clip = time.perf_counter(), 0.0, []
        for live in itertools.islice(frames, args.stride):
            clip.append(centre(live.rgb))
            busy -= time.process_time()
            shown.show(clip[-1])
            busy += time.process_time()
        stream = time.perf_counter() - started
        clip = torch.stack(clip * (args.time // args.stride))[None]
        started = time.process_time()
        with torch.no_grad(), runtime.autocast():
            model(*key_residual_split(clip, args.stride, runtime.precision))
        again = time.process_time() - started
        if counted >= 0:
            rounds.append(again / (busy / args.stride))
            whole.append(args.stride / stream)
    print(
        f"{describe(cpu)}; torch {torch.__version__}; {args.model}, {args.fusion}, {runtime.precision_name}, "
        f"T {args.time}, stride {args.stride}, {args.size} px, downsample; {args.rounds} rounds\n"
        f"processor time: a frame of the stream {statistics.median(rounds):.1f}x as fast as the whole clip for each "
        f"new frame ({min(rounds):.1f} to {max(rounds):.1f})\n"
        f"the whole stream: {statistics.median(whole):.2f} frames/s ({min(whole):.2f} to {max(whole):.2f})"
    )


def exported(args: argparse.Namespace) -> ReSpike:
    """Random weights, by way of a file."""
    settings = dict(
        backbone=args.model, num_classes=51, stride=args.stride, downsample=True, branches="both", fusion=args.fusion,
        snn_batch_norm="per-step", classes=[str(label) for label in range(51)], T=args.time, residual="key",
        neuron="lif", tau=4 / 3, surrogate="atan", alpha=2.0,
    )  # fmt: skip
    model = ReSpike(**{name: settings[name] for name in SETTINGS})
    flags = dict(dset="hmdb51", size=args.size, sampling="window", frame_stride=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        export(TrainedNetwork(path, model.state_dict(), settings, flags, epochs=0), path)
        return ReSpike.from_checkpoint(path).to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
