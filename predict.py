"""What a trained network sees in videos.

    python predict.py runs/demo/best.pt data/demo/videos/grow             # files and folders: top-5 of each video
    python predict.py runs/demo/best.pt video.mp4 --save annotated        # the prediction as it develops, as a video
    python predict.py runs/demo/best.pt --stream /dev/video0              # a camera, an address, or a file as it comes

The checkpoint answers what the network, its clips and its classes are. docs/predict.md tells more.
"""

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torchvision.transforms import v2

from dataset.clips import VideoTable, eval_clips
from dataset.decode import every_frame
from dataset.device_loader import DeviceLoader, LoaderMaker
from dataset.find import find_videos
from dataset.frame_sampling import SAMPLINGS, FrameSampling
from dataset.index import VideoIndex, VideoInfo
from dataset.live import LiveFrame, SourceError, frames_of
from dataset.residual import key_residual_split, normalised
from dataset.splits import VideoRecord
from dataset.transforms import CROP_POSITIONS, eval_short_side, eval_transforms
from models import Network, ReSpike, load_network
from models.neurons import BACKENDS, runs_on_triton
from models.streaming import StreamState, check_neurons, start_segment, step
from utils.annotate import VideoWriter, draw
from utils.device import choose_algorithms, choose_device, choose_precision, cpu_count
from utils.errors import ArgumentParser, UserError
from utils.files import writing
from utils.runtime import Runtime
from utils.script import run_script
from utils.trained import TrainedNetwork
from utils.training.flags import number, whole
from utils.training.metrics import FiringRates

TOP = 5
FPS_OVER = 30  # frames that the reported frame rate is a mean over
NO_FRAME_RATE = 25.0  # of a video whose container names none


def parse_args() -> argparse.Namespace:
    # fmt: off
    parser = ArgumentParser(description="Top-5 classes of videos, or a running prediction of a stream.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT",
        help="a checkpoint, a run folder for its best.pt, or an exported .safetensors file")
    add("videos", nargs="*", metavar="VIDEO",
        help="a video, a folder (all videos below it), or - for paths from standard input, one a line")
    add("--list", metavar="FILE", help="paths of videos, one a line; they start from the current folder")
    add("--json", action="store_true", help="one JSON object a line")
    add("--views", type=whole(1), metavar="N", help="clips a video, evenly spread; not given: as the training tested")
    add("--crops", type=int, choices=sorted(CROP_POSITIONS), help="crops a view; not given: as the training tested")
    add("-b", "--batch-size", type=whole(1), default=8, metavar="N", help="clips a batch")
    add("-j", "--workers", type=whole(0), metavar="N",
        help="data loading processes; 0 loads in the main process; not given: one a core, 8 at most")
    add("--device", metavar="NAME", help="cuda, cuda:1 or cpu; not given: cuda if there is a GPU")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="mixed precision, if the hardware has it; not given: as the training")
    add("--lif-backend", choices=BACKENDS, default="auto", help="code of the spiking layers")
    add("--save", metavar="FOLDER", help="write an annotated .mp4 of each video: prediction so far, firing rates")
    add("--stream", metavar="SOURCE", help="predict frame by frame: a file, a camera (/dev/video0), or an address "
        "(rtsp://..., http://...)")
    add("--realtime", action="store_true", help="--stream: pace a source by its timestamps; drop frames if too slow")
    add("--timeout", type=number(0), default=10.0, metavar="S", help="--stream: seconds without a frame that end it")
    # fmt: on
    args = parser.parse_intermixed_args()  # flags may stand between the checkpoint and the videos
    if args.stream is not None:
        for flag in ("videos", "list", "save", "views", "crops"):
            if getattr(args, flag):
                raise UserError(f"--stream: takes one source and no {'VIDEO' if flag == 'videos' else f'--{flag}'}")
    elif not args.videos and args.list is None:
        raise UserError("which videos? Give files, folders, - for standard input, --list FILE or --stream SOURCE")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main() -> int:
    args = parse_args()
    model = load_network(args.checkpoint, args.lif_backend)
    trained = model.trained
    if (args.stream or args.save) and not isinstance(model, ReSpike):
        raise UserError(
            f"--{'stream' if args.stream else 'save'}: predicts frame by frame; a {trained.network} "
            f"({trained.settings['backbone']}) needs all {trained.frames} frames of a clip; leave the flag out"
        )
    if args.stream or args.save:
        check_neurons(model)
    device = choose_device(args.device)
    runtime = Runtime(
        device, choose_precision(device, trained.flags.get("amp", True) if args.amp is None else args.amp)
    )
    runs_on_triton(args.lif_backend, torch.empty(0, device=device))  # refused if it cannot
    choose_algorithms(deterministic=False)
    model.to(device, memory_format=model.memory_format)
    if args.stream is not None:
        return stream(model, runtime, args.stream, args.realtime, args.timeout, args.json)

    failures = Failures()
    if args.save is not None:
        with writing(args.save, about="save"):
            Path(args.save).mkdir(parents=True, exist_ok=True)
    paths = list(failures.keep(find_videos(args.videos, args.list)))
    if not paths and not failures.count:
        raise UserError("no video: standard input, or the --list, names none")
    infos = VideoIndex(None).lookup(paths, workers=cpu_count())
    readable = [path for path in paths if not failures.note(infos[path].error)]
    views, crops = args.views or trained.flags.get("views", 1), args.crops or trained.flags.get("crops", 1)
    clips = Clips(trained, views, crops)
    workers = min(8, cpu_count(), len(readable) - 1) if args.workers is None else args.workers
    predicted = predict(model, runtime, readable, infos, clips, args.batch_size, workers, failures)
    for path, probabilities in predicted:
        best = top(probabilities, trained.classes)
        if args.json:
            print(json.dumps({"path": path, "top5": best}), flush=True)
        else:
            print(path, *(f"{100 * share:8.1f} %  {name}" for name, share in best), sep="\n", flush=True)
    if args.save is not None:
        for path, target in zip(readable, annotated_names(readable, Path(args.save)), strict=True):
            failures.note(save_annotated(model, runtime, path, infos[path], Clips(trained), target))
    return 1 if failures.count else 0


class Failures:
    """What could not be read: one line each on stderr; the rest goes on."""

    def __init__(self):
        self.count = 0

    def note(self, error: str | None) -> bool:
        """Print and count an error. Returns whether it is one."""
        if error is not None:
            print(f"error: {error}", file=sys.stderr, flush=True)
            self.count += 1
        return error is not None

    def keep(self, found: Iterable[str | UserError]) -> Iterator[str]:
        for item in found:
            if isinstance(item, UserError):
                self.note(str(item))
            else:
                yield item


# ---- whole videos -------------------------------------------------------------------------------------


class Clips:
    """The clips that the training script of a network tests it on."""

    def __init__(self, trained: TrainedNetwork, views: int = 1, crops: int = 1):
        size, flags = trained.size, trained.flags
        self.crops = crops
        self.sampling: FrameSampling = SAMPLINGS[trained.sampling](trained.frames, flags["frame_stride"], views)
        self.transforms = eval_transforms(size, eval_short_side(size, flags["dset"]), crops)

    @property
    def centre(self) -> v2.Transform:
        return self.transforms[len(self.transforms) // 2]


def predict(
    model: Network, runtime: Runtime, paths: list[str], infos: dict[str, VideoInfo], clips: Clips, batch_size: int,
    workers: int, failures: Failures,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """(path, probabilities [classes]) of each video: the softmax of its clips, averaged over views and crops."""
    table = VideoTable([VideoRecord(path, 0, path) for path in paths], [infos[path] for path in paths])
    rows = eval_clips(table, clips.sampling, clips.crops)
    if not len(rows):
        return
    trained = model.trained
    loader: DeviceLoader = LoaderMaker(
        clips.sampling, trained.stride, trained.residual, batch_size, workers, 0, False, runtime
    ).eval(table, rows, clips.transforms)
    left = numpy.bincount(rows["video"]).tolist()  # clips to come, by video
    sums = {}
    for batch in loader:
        for failed in batch.failed:
            if left[failed.video]:
                failures.note(failed.error)
                left[failed.video] = 0
        if not len(batch.videos):
            continue
        with torch.no_grad(), runtime.autocast():
            split = loader.split(batch)
            shares = model(split.key, split.residual).double().softmax(1).cpu()
        for video, share in zip(batch.videos.tolist(), shares, strict=True):
            sums[video] = sums.get(video, 0) + share
            left[video] -= 1
            if left[video] == 0:
                yield paths[video], sums[video] / sums[video].sum()


def top(probabilities: Tensor, classes: list[str]) -> list[tuple[str, float]]:
    """The best five, best first."""
    best = probabilities.topk(min(TOP, len(classes)))
    return [(classes[label], share) for share, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


# ---- frame by frame -----------------------------------------------------------------------------------


class Judged(NamedTuple):
    """A frame and what it tells. Pictures are uint8 [3, H, W]."""

    frame: Tensor
    key: Tensor
    reference: Tensor | None  # what the residual was taken from; None for a key frame
    probabilities: Tensor | None  # [classes]; None before the first residual frame


class FrameByFrame:
    """A network that is shown a video frame by frame, each uint8 [3, size, size], as `Clips.centre` crops it."""

    def __init__(self, model: ReSpike, runtime: Runtime):
        self._model, self._runtime, self._trained = model, runtime, model.trained
        self.state = StreamState(segments=self._trained.frames // self._trained.stride)
        self._frames = 0
        self._key = self._previous = self._probabilities = None

    def show(self, frame: Tensor) -> Judged:
        on_device, reference = frame.to(self._runtime.device), None
        with torch.no_grad(), self._runtime.autocast():
            if self._frames % self._trained.stride == 0:
                self._key = frame
                self.state = start_segment(self._model, self._as_input(normalised(on_device[None])), self.state)
            else:
                reference = self._previous if self._trained.residual == "previous" else self._key
                # A segment of two frames, of which the first is what the second is compared with.
                pair = torch.stack([reference.to(self._runtime.device), on_device])[None]
                minus = "none" if self._trained.residual == "none" else "key"
                residual = key_residual_split(pair, 2, minus=minus)[1][:, 0, 0]
                logits, self.state = step(self._model, self._as_input(residual), self.state)
                self._probabilities = logits[0].double().softmax(0).cpu()
        self._frames += 1
        self._previous = frame
        return Judged(frame, self._key, reference, self._probabilities)

    def _as_input(self, frame: Tensor) -> Tensor:
        return frame.to(self._runtime.precision or torch.float32).contiguous(memory_format=torch.channels_last)


def save_annotated(
    model: ReSpike, runtime: Runtime, path: str, info: VideoInfo, clips: Clips, target: Path
) -> str | None:
    """Write the annotated video. Returns the error if the video cannot be decoded."""
    if model.trained.sampling == "window":
        wanted = list(range(0, info.frames, model.trained.flags["frame_stride"]))
    else:  # frames of the whole video make one clip
        wanted = clips.sampling.at(info.frames, 0)
    shown = FrameByFrame(model, runtime)
    writer = VideoWriter(target, (info.fps or NO_FRAME_RATE) * len(wanted) / info.frames)
    counts = numpy.bincount(wanted, minlength=info.frames)
    try:
        for index, rgb in enumerate(every_frame(path)):
            for _ in range(counts[index] if index < len(counts) else 0):  # a short video repeats frames
                frame = clips.centre(torch.from_numpy(rgb.copy()).permute(2, 0, 1))
                with FiringRates(model) as rates:
                    judged = shown.show(frame)
                fired = rates.per_stage() if judged.reference is not None else {}
                best = [] if judged.probabilities is None else top(judged.probabilities, model.trained.classes)
                residual = None if judged.reference is None else visible_residual(judged, model.trained.residual)
                pictures = (_picture(part) for part in (frame, judged.key, residual))
                writer.add(draw(*pictures, best, fired, f"{Path(path).name[:18]}, frame {index}"))
    except UserError as error:
        return str(error)
    writer.close()
    return None


def visible_residual(judged: Judged, kind: str) -> Tensor:
    """uint8 [3, H, W]: grey if nothing moved; the frame itself for residuals of kind "none"."""
    if kind == "none":
        return judged.frame
    return ((judged.frame.int() - judged.reference.int() + 255) // 2).to(torch.uint8)


def _picture(frame: Tensor | None) -> numpy.ndarray | None:
    return None if frame is None else frame.permute(1, 2, 0).contiguous().numpy()


def annotated_names(paths: list[str], folder: Path) -> list[Path]:
    """<name of the source>.mp4 for each; a number is added if the name is taken, by a source itself too."""
    taken, targets = {Path(path).resolve() for path in paths}, []
    for path in paths:
        target, count = folder / f"{Path(path).stem}.mp4", 1
        while target.resolve() in taken:
            count += 1
            target = folder / f"{Path(path).stem}-{count}.mp4"
        taken.add(target.resolve())
        targets.append(target)
    return targets


# ---- a stream -----------------------------------------------------------------------------------------


def stream(model: ReSpike, runtime: Runtime, source: str, realtime: bool, timeout: float, as_json: bool) -> int:
    """Print the prediction after each frame until the source ends (0), stalls or breaks (1)."""
    trained = model.trained
    if trained.sampling != "window":
        print(f"note: trained on {trained.frames} frames spread over whole videos (--sampling {trained.sampling}), "
            "a stream gives neighbouring frames", file=sys.stderr)  # fmt: skip
    centre, shown, report = Clips(trained).centre, FrameByFrame(model, runtime), StreamReport(as_json)
    try:
        for live in frames_of(source, trained.flags["frame_stride"], realtime, timeout):
            frame = centre(torch.from_numpy(live.rgb.copy()).permute(2, 0, 1))
            probabilities = shown.show(frame).probabilities
            report.frame(live, None if probabilities is None else top(probabilities, trained.classes)[0])
    except SourceError as error:
        report.leave_line()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the usual end of an endless stream
        report.close("interrupted")
        return 130
    report.close("the source ended")
    return 0


class StreamReport:
    """Lines about the frames of a stream; on a terminal, one line that is renewed each second."""

    def __init__(self, as_json: bool):
        self._as_json, self._renews = as_json, sys.stdout.isatty() and not as_json
        self._done: list[float] = []  # when the latest frames were done
        self._latencies: list[float] = []  # of the latest thousand
        self._frames = self._dropped = 0
        self._started = self._printed = time.monotonic()

    def frame(self, live: LiveFrame, best: tuple[str, float] | None) -> None:
        now = time.monotonic()
        latency = 1000 * (now - live.arrived)
        self._frames, self._dropped = self._frames + 1, live.dropped
        self._latencies = [*self._latencies[-999:], latency]
        self._done = [*self._done[-FPS_OVER:], now]
        fps = (len(self._done) - 1) / (now - self._done[0]) if len(self._done) > 1 else 0.0
        name, share = best or (None, None)
        if self._as_json:
            print(json.dumps({
                "time": round(live.seconds, 3), "prediction": name, "probability": share,
                "latency_ms": round(latency, 1), "fps": round(fps, 2), "dropped": live.dropped,
            }), flush=True)  # fmt: skip
        elif not self._renews or now - self._printed >= 1.0:
            told = "no prediction yet" if best is None else f"{name} {100 * share:.1f} %"
            line = f"{live.seconds:8.2f} s  {told}  {latency:.0f} ms  {fps:.1f} frames/s  {live.dropped} dropped"
            print(f"\r\033[K{line}" if self._renews else line, end="" if self._renews else "\n", flush=True)
            self._printed = now

    def leave_line(self) -> None:
        if self._renews:
            print()

    def close(self, why: str) -> None:
        self.leave_line()
        rate = self._frames / max(1e-9, time.monotonic() - self._started)
        latency = statistics.median(self._latencies) if self._latencies else 0.0
        line = f"{why}: {self._frames} frames, {rate:.1f} frames/s, median latency {latency:.0f} ms"
        print(f"{line}, {self._dropped} dropped", file=sys.stderr if self._as_json else sys.stdout, flush=True)


if __name__ == "__main__":
    run_script(main)
