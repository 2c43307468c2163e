"""Train ReSpike on HMDB-51, UCF-101 or the generated demo videos.

    python train_fusion.py --dset hmdb51 --model resnet50 -T 16 -b 32 -lr 0.0001 --stride 4 --downsample

Reads top to bottom: settings, the run, its data, its network. What a run does with them lives in
utils/fit.py (epochs, checkpoints) and utils/engine.py (one epoch).
"""

import argparse
import os
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dataset.demo import DemoSettings, generate_demo
from dataset.index import VideoIndex
from dataset.records import Split, VideoRecord, cut_validation, drop, read_hmdb51, read_ucf101
from dataset.report import report_files
from dataset.residual import check_stride
from dataset.transforms import test_transform, train_transform
from dataset.video import VideoDataset, count_looped, every_clip, fingerprint, make_loader, random_clips, spread_clips
from models import ReSpike
from models.resnet import BACKBONES
from models.respike import BRANCHES, FUSIONS, SIZE_MULTIPLE
from models.spiking_resnet import BATCH_NORMS
from utils.checkpoint import load_checkpoint
from utils.device import choose_device, choose_precision, cpu_count, device_name
from utils.engine import TrainPosition, cosine_with_warmup, evaluate
from utils.errors import ArgumentParser, UserError, run_script
from utils.fit import TrainingState, fit
from utils.run_folder import RunFolder
from utils.seed import seed_all
from utils.stopping import StopRequest

# ---------------------------------------------------------------------------------------------------
# Where the data sets are; --data-root and --annotation-path override.
DATA_ROOT = {"hmdb51": "data/hmdb51/videos", "ucf101": "data/ucf101/UCF-101", "demo": "data/demo"}
ANNOTATION_PATH = {"hmdb51": "data/hmdb51/splits", "ucf101": "data/ucf101/ucfTrainTestlist", "demo": ""}
# What follows the data set: a flip would swap the demo's left and right; its shapes are small already.
FLIP = {"hmdb51": True, "ucf101": True, "demo": False}
CROP_AREA = {"hmdb51": (0.08, 1.0), "ucf101": (0.08, 1.0), "demo": (0.6, 1.0)}  # share of the frame
PUBLISHED_CLIP_STEP = 16  # frames between the windows of --clips-per-video all
MOMENTUM = 0.9
# Flags that may differ between a run and its continuation without a word.
NOT_TRAINING_FLAGS = {
    "resume", "run_dir", "overwrite", "workers", "index_dir", "weights", "device", "data_root", "annotation_path",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train ReSpike on HMDB-51, UCF-101 or generated demo videos.")
    yes_no = BooleanOptionalAction
    cores = cpu_count()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dset", default="hmdb51", choices=sorted(DATA_ROOT), help="data set")
    add("--data-root", help="folder of the class folders; the default is DATA_ROOT in this script")
    add("--annotation-path", help="folder of the split files; the default is ANNOTATION_PATH in this script")
    add("--split", type=int, default=1, choices=(1, 2, 3), help="official split")
    add("--val-fraction", type=float, default=0.0, metavar="SHARE",
        help="training videos, in whole source groups, to select the model on; 0 selects on the test set and says so")
    add("-T", "--time", type=int, default=16, metavar="N", help="frames a clip; a multiple of --stride")
    add("--stride", type=int, default=4, metavar="N", help="frames a segment: one key frame, the others residual")
    add("--frame-stride", type=int, default=1, metavar="N", help="video frames from one clip frame to the next")
    add("--clips-per-video", default="one", choices=("one", "all"),
        help="training clips a video and epoch: a random window, or every window 16 frames apart (as published)")
    add("--views", type=int, default=1, metavar="N", help="test windows a video, evenly spread; 1 is the centred one")
    add("--size", type=int, default=224, metavar="PIXELS", help="height and width; a multiple of 32")
    add("-j", "--workers", type=int, default=min(8, cores), metavar="N", help="data loading processes; 0: none beside")
    add("--strict", action=yes_no, default=False, help="fail where a video cannot be read, not leave it out")
    add("--index-dir", default=os.path.join(cache, "respike"), help="folder of the cached video index")

    add = parser.add_argument_group("network").add_argument
    add("--model", default="resnet18", choices=BACKBONES, help="ANN backbone")
    add("--weights", default="default", metavar="default|none|PATH",
        help="backbone weights: torchvision's for ImageNet (or its name of one), random, or a state dict")
    add("--downsample", action=yes_no, default=False,
        help="fuse at all four stages, the first two at reduced size; else at stages 2 to 4 at full size")
    add("--branches", default="both", choices=BRANCHES, help="both branches, or one alone")
    add("--fusion", default="cross", choices=FUSIONS, help="cross-attention, or joined at the head only")
    add("--snn-bn", default="per-step", choices=BATCH_NORMS, help="SNN batch norm: statistics a time step, or of all")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=100, metavar="N", help="epochs in all")
    add("--start_epoch", "--start-epoch", type=int, default=0, metavar="N",
        help="epoch to count from, for the learning rate; a resumed run knows its own")
    add("-b", "--batch_size", "--batch-size", type=int, default=64, metavar="N", help="clips a batch")
    add("-lr", "--learning_rate", "--learning-rate", type=float, default=0.01, metavar="LR", help="its peak")
    add("--weight_decay", "--weight-decay", type=float, default=1e-4, metavar="W", help="weight decay")
    add("--warmup-epochs", type=int, default=0, metavar="N", help="epochs of linear warm-up before the cosine")
    add("--label-smoothing", type=float, default=0.0, metavar="S", help="at least 0, below 1")
    add("--accumulate", type=int, default=1, metavar="N", help="batches an optimizer step")
    add("--clip-norm", type=float, metavar="NORM", help="largest norm of the gradient; none: not clipped")
    add("--seed", type=int, default=1001, help="seed of everything random")
    add("--amp", action=yes_no, default=True,
        help="mixed precision: bf16 where the hardware has it, fp16 on older GPUs; --no-amp is fp32")
    add("--compile", action=yes_no, default=False, help="torch.compile the network")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")

    add = parser.add_argument_group("run folder").add_argument
    add("--run-dir", "--output-dir", help="folder of this run; the default is named for what it trains, in runs/")
    add("--resume", metavar="auto|PATH", help="continue from a checkpoint; auto: the run folder's last, if any")
    add("--overwrite", action=yes_no, default=False, help="replace the run that the folder holds")
    # fmt: on

    args = parser.parse_args()
    check_args(args)
    if args.run_dir is None:
        variant = "downsample" if args.downsample else "full"
        args.run_dir = (
            f"runs/{args.dset}-split{args.split}-{args.model}-{args.branches}-{args.fusion}-{variant}"
            f"-T{args.time}-stride{args.stride}-lr{args.learning_rate:g}-seed{args.seed}"
        )
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for the first flag whose value cannot work."""
    check_stride(args.time, args.stride)
    if args.size < SIZE_MULTIPLE or args.size % SIZE_MULTIPLE:
        nearest = max(1, round(args.size / SIZE_MULTIPLE)) * SIZE_MULTIPLE
        raise UserError(f"--size must be a multiple of {SIZE_MULTIPLE}, got {args.size}; the nearest is {nearest}")
    least = {"frame_stride": 1, "views": 1, "workers": 0, "epochs": 1, "start_epoch": 0, "batch_size": 1,
             "warmup_epochs": 0, "accumulate": 1, "learning_rate": 0, "weight_decay": 0}  # fmt: skip
    for flag, low in least.items():
        if not getattr(args, flag) >= low:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {low}, got {getattr(args, flag)}")
    for flag in ("val_fraction", "label_smoothing"):
        if not 0 <= getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 0 and below 1, got {getattr(args, flag)}")
    if args.clip_norm is not None and not args.clip_norm > 0:
        raise UserError(f"--clip-norm must be positive, got {args.clip_norm}")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch} leaves none of --epochs {args.epochs} to train")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2^63, got {args.seed}")
    if args.dset == "demo" and args.annotation_path is not None:
        raise UserError("--annotation-path: the demo makes its own split files, under --data-root")
    if args.resume and args.start_epoch:
        raise UserError("--start_epoch: a resumed run continues at its checkpoint's epoch; give one of the two")


def main() -> int:
    args = parse_args()
    device = choose_device(args.device)
    precision = choose_precision(device, args.amp)
    seed_all(args.seed)
    run = RunFolder(Path(args.run_dir), continues_run(args), args.overwrite)
    print(f"run folder: {run.path}; {device_name(device)}, {str(precision or torch.float32).removeprefix('torch.')}")

    data = load_data(args, run, pin=device.type == "cuda")
    state = build(args, run, data, device)
    run.write_config(vars(args), network=state.settings, device=device_name(device), precision=str(precision))

    passes = dict(device=device, precision=precision, stride=args.stride)
    finished = fit(
        state, data.train_loader, data.selection_loader, run, **passes, epochs=args.epochs,
        learning_rate=lambda epoch: args.learning_rate * cosine_with_warmup(epoch, args.epochs, args.warmup_epochs),
        classes=len(data.classes), selected_on=data.selected_on, label_smoothing=args.label_smoothing,
        accumulation_steps=args.accumulate, clip_norm=args.clip_norm,
    )  # fmt: skip
    if finished and state.best["epoch"] is None:
        print(f"no epoch was left to train: the checkpoint is at epoch {state.position.epoch} of {args.epochs}")
    elif finished and data.selected_on == "test":
        print(
            f"best test video top-1 {state.best['video_top1']:.2f} % at epoch {state.best['epoch'] + 1}: selected on "
            "the test set itself, so optimistic; --val-fraction selects without it"
        )
    elif finished:
        state.model.load_state_dict(load_checkpoint(run.best)["model"])
        with StopRequest() as stop:
            scored = evaluate(
                state.model, data.test_loader, len(data.classes), **passes, task="test", should_stop=stop.requested
            )
        if scored is None:
            print(f"stopped by {stop.name} in the test; --resume auto tests again")
            return 0
        run.write_result({"epoch": state.best["epoch"], **scored})
        print(
            f"test of epoch {state.best['epoch'] + 1}, selected on validation videos: clip top-1 "
            f"{scored['clip_top1']:.2f} %, video top-1 {scored['video_top1']:.2f} %, top-5 {scored['video_top5']:.2f} %"
        )
    run.close()
    return 0


# ---- data: lists -> what is on disk and readable -> clips -> loaders ---------------------------------


@dataclass
class Data:
    classes: list[str]
    train_loader: DataLoader
    selection_loader: DataLoader  # what the best epoch is chosen on: "val" or "test"
    selected_on: str
    test_loader: DataLoader


def load_data(args: argparse.Namespace, run: RunFolder, pin: bool) -> Data:
    split = read_split(args)
    index = VideoIndex(Path(args.index_dir) / f"{args.dset}.json")
    paths = [record.path for record in split.train + split.test]
    infos = index.lookup(paths, workers=cpu_count())
    report_files(run, split, infos, args.strict)
    split = drop(split, [path for path, info in infos.items() if info.error])
    if not split.train or not split.test:
        raise UserError(f"{run.path / 'unreadable.txt'}: no readable video is left to train or to test on")
    train, val = split.train, []
    if args.val_fraction > 0:
        train, val = cut_validation(split.train, args.val_fraction, args.seed)

    clip_shape = dict(clip_frames=args.time, frame_stride=args.frame_stride)
    loading = dict(batch_size=args.batch_size, workers=args.workers, seed=args.seed, pin=pin)

    def testing(records: list[VideoRecord]) -> DataLoader:
        found = [infos[record.path] for record in records]
        clips = spread_clips(found, **clip_shape, views=args.views)
        transform = test_transform(args.size)
        dataset = VideoDataset(records, found, clips, **clip_shape, transform=transform, seed=args.seed)
        return make_loader(dataset, shuffle=False, **loading)

    found = [infos[record.path] for record in train]
    clips = random_clips(train)
    if args.clips_per_video == "all":
        clips = every_clip(found, **clip_shape, step_frames=PUBLISHED_CLIP_STEP)
    transform = train_transform(args.size, FLIP[args.dset], CROP_AREA[args.dset])
    dataset = VideoDataset(train, found, clips, **clip_shape, transform=transform, seed=args.seed)
    looped = count_looped([infos[record.path] for record in split.train + split.test], **clip_shape)
    print(
        f"data: training on {len(clips)} clips of {len(train)} videos; {f'{len(val)} to validate, ' if val else ''}"
        f"{len(split.test)} to test, {args.views} clips each; {looped} are shorter than a clip and looped"
    )
    test_loader = testing(split.test)
    return Data(
        split.classes, make_loader(dataset, shuffle=True, **loading), testing(val) if val else test_loader,
        "val" if val else "test", test_loader,
    )  # fmt: skip


def read_split(args: argparse.Namespace) -> Split:
    data_root = args.data_root or DATA_ROOT[args.dset]
    annotation_path = args.annotation_path or ANNOTATION_PATH[args.dset]
    if args.dset == "demo":
        data_root, annotation_path = generate_demo(Path(data_root), DemoSettings(), workers=cpu_count())
    read = read_ucf101 if args.dset == "ucf101" else read_hmdb51
    return read(data_root, annotation_path, args.split)


# ---- network, optimizer, and where an earlier run left them ------------------------------------------


def build(args: argparse.Namespace, run: RunFolder, data: Data, device: torch.device) -> TrainingState:
    network = dict(
        backbone=args.model, num_classes=len(data.classes), stride=args.stride, downsample=args.downsample,
        branches=args.branches, fusion=args.fusion, snn_batch_norm=args.snn_bn,
    )  # fmt: skip
    checkpoint = find_checkpoint(args.resume, run)
    model = ReSpike(**network, weights=args.weights if checkpoint is None else None)
    model = model.to(device, memory_format=torch.channels_last)
    print(f"network: {sum(p.numel() for p in model.parameters()):,} parameters, {len(data.classes)} classes")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=MOMENTUM, weight_decay=args.weight_decay,
        fused=True,
    )  # fmt: skip
    # float16 needs its gradients scaled; --amp gives it on GPUs that have no bfloat16.
    scaler = torch.amp.GradScaler(device.type, enabled=choose_precision(device, args.amp) == torch.float16)
    settings = {**network, "classes": data.classes, "T": args.time}
    order = {
        "set of training clips": fingerprint(data.train_loader), "batch size": args.batch_size, "seed": args.seed,
        "number of batches a step": args.accumulate,
    }  # fmt: skip
    state = TrainingState(
        model, optimizer, scaler, settings, order, selection=fingerprint(data.selection_loader), flags=vars(args),
        position=TrainPosition(args.start_epoch),
    )  # fmt: skip
    if checkpoint is not None:
        state.restore(checkpoint, run, NOT_TRAINING_FLAGS)
    if args.compile:
        model.compile()
    return state


def continues_run(args: argparse.Namespace) -> bool:
    """Whether the run folder's own run goes on: --resume auto, or one of its checkpoints."""
    return args.resume is not None and (
        args.resume == "auto" or Path(args.resume).resolve().parent == Path(args.run_dir).resolve()
    )


def find_checkpoint(resume: str | None, run: RunFolder) -> Path | None:
    if resume is None:
        return None
    if resume != "auto":
        return Path(resume)
    if not run.last.exists():
        print(f"--resume auto: no checkpoint in {run.path}; starting anew")
        return None
    return run.last


if __name__ == "__main__":
    run_script(main)
