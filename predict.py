"""What a trained network sees in videos.

    python predict.py runs/demo/best.pt data/demo/videos/grow             # files and folders: top-5 of each video
    python predict.py runs/demo/best.pt video.mp4 --save annotated        # the prediction as it develops, as a video
    python predict.py runs/demo/best.pt --stream /dev/video0              # a camera, an address, or a file as it comes

Reads top to bottom: the flags, the network, the videos, their classes. utils/prediction/ has the clips of a video,
annotated videos and streams. The checkpoint answers what the network, its clips and its classes are. docs/predict.md
tells more.
"""

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor

from dataset.clips import VideoTable, eval_clips
from dataset.device_loader import DeviceLoader, LoaderMaker
from dataset.find import find_videos
from dataset.index import VideoIndex, VideoInfo
from dataset.splits import VideoRecord
from dataset.transforms import CROP_POSITIONS
from models import Network, ReSpike, load_network
from models.neurons import BACKENDS, runs_on_triton
from models.streaming import check_neurons
from utils.device import choose_algorithms, choose_device, choose_precision, cpu_count
from utils.errors import ArgumentParser, UserError
from utils.files import writing
from utils.prediction.annotated import annotated_names, save_annotated
from utils.prediction.clips import Clips, top
from utils.prediction.stream import predict_stream
from utils.runtime import Runtime
from utils.script import run_script
from utils.training.flags import number, whole


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
    elif args.realtime:
        raise UserError("--realtime: paces a stream; it goes with --stream SOURCE")
    elif not args.videos and args.list is None:
        raise UserError("which videos? Give files, folders, - for standard input, --list FILE or --stream SOURCE")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main() -> int:
    args = parse_args()
    model, runtime = load(args)
    if args.stream is not None:
        return predict_stream(model, runtime, args.stream, args.realtime, args.timeout, args.json)
    if args.save is not None:
        with writing(args.save, about="save"):
            Path(args.save).mkdir(parents=True, exist_ok=True)
    failures = Failures()
    videos = find(args, failures)
    for path, probabilities in predict(args, model, runtime, videos, failures):
        best = top(probabilities, model.trained.classes)
        if args.json:
            print(json.dumps({"path": path, "top5": best}), flush=True)
        else:
            print(path, *(f"{100 * share:8.1f} %  {name}" for name, share in best), sep="\n", flush=True)
    if args.save is not None:
        names = annotated_names([path for path, _ in videos], Path(args.save))
        for (path, info), target in zip(videos, names, strict=True):
            failures.note(save_annotated(model, runtime, path, info, target))
    return 1 if failures.count else 0


# ---- network ------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Network, Runtime]:
    """The network of the checkpoint on its device, and how it is computed."""
    model = load_network(args.checkpoint, args.lif_backend)
    trained = model.trained
    if args.stream or args.save:
        if not isinstance(model, ReSpike):
            raise UserError(
                f"--{'stream' if args.stream else 'save'}: predicts frame by frame; a {trained.network} "
                f"({trained.settings['backbone']}) needs all {trained.frames} frames of a clip; leave the flag out"
            )
        check_neurons(model)
    device = choose_device(args.device)
    amp = trained.flags.get("amp", True) if args.amp is None else args.amp
    runtime = Runtime(device, choose_precision(device, amp))
    runs_on_triton(args.lif_backend, torch.empty(0, device=device))  # refused if it cannot
    choose_algorithms(deterministic=False)
    return model.to(device, memory_format=model.memory_format), runtime


# ---- videos -------------------------------------------------------------------------------------------


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


def find(args: argparse.Namespace, failures: Failures) -> list[tuple[str, VideoInfo]]:
    """The path of each video that can be read, and what is known of it. A video that is named twice is there twice."""
    paths = []
    for found in find_videos(args.videos, args.list):
        if isinstance(found, UserError):
            failures.note(str(found))
        else:
            paths.append(found)
    if not paths and not failures.count:
        raise UserError("no video: standard input, or the --list, names none")
    infos = VideoIndex(None).lookup(paths, workers=cpu_count())
    return [(path, infos[path]) for path in paths if not failures.note(infos[path].error)]


def predict(
    args: argparse.Namespace, model: Network, runtime: Runtime, videos: list[tuple[str, VideoInfo]], failures: Failures
) -> Iterator[tuple[str, Tensor]]:
    """(path, probabilities [classes]) of each video: the softmax of its clips, averaged over views and crops."""
    trained = model.trained
    crops = args.crops or trained.flags.get("crops", 1)
    clips = Clips(trained, args.views or trained.flags.get("views", 1), crops)
    table = VideoTable([VideoRecord(path, 0, path) for path, _ in videos], [info for _, info in videos])
    rows = eval_clips(table, clips.sampling, crops)
    if not len(rows):
        return
    workers = min(8, cpu_count(), len(videos) - 1) if args.workers is None else args.workers
    loader: DeviceLoader = LoaderMaker(
        clips.sampling, trained.stride, trained.residual, args.batch_size, workers, 0, False, runtime
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
                yield videos[video][0], sums[video] / sums[video].sum()


if __name__ == "__main__":
    run_script(main)
