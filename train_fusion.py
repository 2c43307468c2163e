"""Train ReSpike on HMDB-51, UCF-101 or the generated demo videos.

    python train_fusion.py --dset hmdb51 --model resnet50 -T 16 -b 32 -lr 0.0001 --stride 4 --downsample

Reads top to bottom: settings, the run, its data, its network. What a run does with them lives in
utils/fit.py (epochs, checkpoints) and utils/engine.py (one epoch).
"""

import argparse
import os
from argparse import BooleanOptionalAction
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from torch.utils.data import DataLoader

from dataset.batch_sampler import EvalBatchSampler, TrainBatchSampler
from dataset.clips import VideoTable, clip_ids, count_short, dense_clips, eval_clips, fingerprint, random_clips
from dataset.demo import DemoSettings, generate_demo
from dataset.frame_sampling import WindowSampling
from dataset.index import VideoIndex
from dataset.readable import report_files
from dataset.splits import Split, cut_validation, drop, read_hmdb51, read_ucf101
from dataset.transforms import eval_transforms, resized_crop
from dataset.video import VideoDataset, make_loader
from models import ReSpike
from models.batch_norm import BATCH_NORMS, synchronise_batch_norm
from models.neurons import BACKENDS, runs_on_triton
from models.resnet import BACKBONES
from models.respike import BRANCHES, FUSIONS
from utils.checkpoint import find_checkpoint, load_checkpoint
from utils.device import choose_algorithms, choose_precision, cpu_count, device_name
from utils.errors import ArgumentParser, UserError
from utils.run_folder import RunFolder, continues_run
from utils.runtime import Processes, join_processes, local_processes
from utils.script import run_script
from utils.seed import seed_all
from utils.training.engine import TrainPosition, cosine_with_warmup
from utils.training.fit import TrainingState, fit, in_checkpoint_order, score
from utils.training.flags import check_flags

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
    "checkpoint_minutes", "keep", "test_only", "lif_backend", "pack_spikes", "deterministic",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train ReSpike on HMDB-51, UCF-101 or generated demo videos.")
    yes_no = BooleanOptionalAction
    cores = max(1, cpu_count() // local_processes())
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
    add("-j", "--workers", type=int, default=min(8, cores), metavar="N",
        help="data loading processes for each training process; 0: none beside")
    add("--strict", action=yes_no, default=False, help="stop where a video cannot be read, not leave it out")
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
    add("-b", "--batch_size", "--batch-size", type=int, default=64, metavar="N", help="clips a batch and process")
    add("-lr", "--learning_rate", "--learning-rate", type=float, default=0.01, metavar="LR", help="its peak")
    add("--weight_decay", "--weight-decay", type=float, default=1e-4, metavar="W", help="weight decay")
    add("--warmup-epochs", type=int, default=0, metavar="N", help="epochs of linear warm-up before the cosine")
    add("--label-smoothing", type=float, default=0.0, metavar="S", help="at least 0, below 1")
    add("--accumulate", type=int, default=1, metavar="N", help="batches an optimizer step")
    add("--clip-norm", type=float, metavar="NORM", help="largest norm of the gradient; none: not clipped")
    add("--seed", type=int, default=1001, help="seed of everything random")
    add("--amp", action=yes_no, default=True,
        help="mixed precision: bf16 where the hardware has it, fp16 on older GPUs; --no-amp is fp32")
    add("--sync-bn", action=yes_no, default=False, help="batch norm statistics of all processes; takes more memory")
    add("--lif-backend", default="auto", choices=BACKENDS,
        help="code of the spiking layers: fused GPU kernels, plain PyTorch, SpikingJelly; auto: kernels on a GPU")
    add("--pack-spikes", action=yes_no, default=False,
        help="keep spikes as one bit each for the backward pass: less memory, some more time")
    add("--deterministic", action=yes_no, default=False,
        help="the same numbers in every run on the same hardware, at some cost in time")
    add("--compile", action=yes_no, default=False, help="torch.compile the network")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")

    add = parser.add_argument_group("run folder").add_argument
    add("--run-dir", "--output-dir", help="folder of this run; the default is named for what it trains, in runs/")
    add("--resume", metavar="auto|PATH", help="continue from a checkpoint; auto: the run folder's newest, if any")
    add("--checkpoint-minutes", type=float, default=15.0, metavar="M", help="between checkpoints in mid-epoch; 0: none")
    add("--keep", type=int, default=2, metavar="N", help="newest checkpoints kept: last.pt, last-1.pt, ...")
    add("--test-only", action=yes_no, default=False, help="no training: test the checkpoint, write test.json")
    add("--overwrite", action=yes_no, default=False, help="replace the run that the folder holds")
    # fmt: on

    args = parser.parse_args()
    check_flags(args)
    if args.dset == "demo" and args.annotation_path is not None:
        raise UserError("--annotation-path: the demo makes its own split files, under --data-root")
    if args.run_dir is None and args.test_only and args.resume != "auto":
        args.run_dir = str(Path(args.resume).parent)
    if args.run_dir is None:
        variant = "downsample" if args.downsample else "full"
        args.run_dir = (
            f"runs/{args.dset}-split{args.split}-{args.model}-{args.branches}-{args.fusion}-{variant}"
            f"-T{args.time}-stride{args.stride}-lr{args.learning_rate:g}-seed{args.seed}"
        )
    return args


def main() -> int:
    args = parse_args()
    device, processes = join_processes(args.device)
    precision = choose_precision(device, args.amp)
    seed_all(args.seed)
    choose_algorithms(args.deterministic)
    processes.together(lambda: runs_on_triton(args.lif_backend, torch.empty(0, device=device)))  # if asked for
    resuming = continues_run(args.resume, args.run_dir, args.test_only)
    run = processes.from_main(lambda: RunFolder(Path(args.run_dir), resuming, args.overwrite))
    print(f"run folder: {run.path}; {device_name(device)}, {str(precision or torch.float32).removeprefix('torch.')}")
    resumed = processes.from_main(lambda: find_checkpoint(args.resume, run.path, needed=args.test_only))

    videos = processes.from_main(lambda: find_videos(args, run, resumed))
    data = processes.together(lambda: load_data(args, *videos, processes, resumed, pin=device.type == "cuda"))
    state = processes.together(lambda: build(args, data, device, processes, resumed))
    resumed = None  # as large as the network and its optimizer
    passes = dict(device=device, precision=precision, stride=args.stride, processes=processes)
    if args.test_only:
        score(
            state.model, data.test_loader, len(data.classes), run, **passes, epoch=state.position.epoch, **data.protocol
        )
        return 0
    config = dict(
        network=state.settings, device=device_name(device), precision=str(precision), processes=processes.count
    )
    processes.from_main(lambda: run.write_config(vars(args), **config))

    finished = fit(
        state, data.train_loader, data.selection_loader, run, **passes, epochs=args.epochs,
        learning_rate=lambda epoch: args.learning_rate * cosine_with_warmup(epoch, args.epochs, args.warmup_epochs),
        classes=len(data.classes), selected_on=data.selected_on, label_smoothing=args.label_smoothing,
        accumulation_steps=args.accumulate, clip_norm=args.clip_norm,
        checkpoint_minutes=args.checkpoint_minutes, keep=args.keep,
    )  # fmt: skip
    if finished and state.best["epoch"] is None:
        print(f"no epoch was left to train: the checkpoint is at epoch {state.position.epoch} of {args.epochs}")
    elif finished and data.selected_on == "test":
        print(
            f"best test video top-1 {state.best['video_top1']:.2f} % at epoch {state.best['epoch'] + 1}: selected on "
            "the test set itself, so optimistic; --val-fraction selects without it"
        )
    elif finished:
        state.model.load_state_dict(processes.from_main(lambda: load_checkpoint(run.best)["model"]))
        epoch = state.best["epoch"] + 1
        print(f"best epoch, selected on validation videos: {epoch}")
        score(state.model, data.test_loader, len(data.classes), run, **passes, epoch=epoch, **data.protocol)
    run.close()
    return 0


# ---- data: lists -> what is on disk and readable -> clips -> loaders ---------------------------------


@dataclass
class Data:
    classes: list[str]
    train_loader: DataLoader
    clip_ids: numpy.ndarray  # of the training clips, in the order that an epoch shuffles
    selection_loader: DataLoader  # what the best epoch is chosen on: "val" or "test"
    selection: str
    selected_on: str
    test_loader: DataLoader
    protocol: dict  # how a test figure came about


def load_data(
    args: argparse.Namespace, classes: list[str], train: VideoTable, val: VideoTable, test: VideoTable,
    processes: Processes, resumed: tuple[Path, dict] | None, pin: bool,
) -> Data:  # fmt: skip
    sampling = WindowSampling(args.time, args.frame_stride, args.views)
    dataset = dict(sampling=sampling, seed=args.seed, strict=args.strict)
    share = dict(rank=processes.rank, processes=processes.count)

    def testing(videos: VideoTable) -> tuple[DataLoader, str]:
        clips = eval_clips(videos, sampling)
        transforms = eval_transforms(args.size, short_side=args.size)
        batches = EvalBatchSampler(clips, args.batch_size, **share)
        loader = make_loader(VideoDataset(videos, clips, transforms=transforms, **dataset), batches, args.workers, pin)
        return loader, fingerprint(videos, clips)

    clips = dense_clips(train, sampling, PUBLISHED_CLIP_STEP) if args.clips_per_video == "all" else random_clips(train)
    names = clip_ids(train, clips)
    if resumed is not None and not args.test_only:
        clips, names = in_checkpoint_order(train, clips, *resumed)
    if len(clips) < processes.count and not args.test_only:
        raise UserError(f"{len(clips)} training clips cannot be shared out to {processes.count} processes; start fewer")
    transforms = [resized_crop(args.size, FLIP[args.dset], CROP_AREA[args.dset])]
    batches = TrainBatchSampler(len(clips), args.batch_size, args.seed, **share)
    train_loader = make_loader(VideoDataset(train, clips, transforms=transforms, **dataset), batches, args.workers, pin)
    test_loader, selection = testing(test)
    selection_loader = test_loader
    if len(val):
        selection_loader, selection = testing(val)
    short = sum(count_short(videos, sampling) for videos in (train, val, test))
    print(
        f"data: training on {len(clips)} clips of {len(train)} videos; "
        f"{f'{len(val)} to validate, ' if len(val) else ''}{len(test)} to test, {args.views} clips each; "
        f"{short} are shorter than a clip and looped"
    )
    print(
        f"an optimizer step: {processes.count} x {args.accumulate} x {args.batch_size} clips (processes, batches, -b)"
    )
    return Data(
        classes, train_loader, names, selection_loader, selection, "val" if len(val) else "test", test_loader,
        protocol=dict(clip=f"{args.time} frames, every {args.frame_stride}.", views=args.views, crops=1),
    )  # fmt: skip


def find_videos(
    args: argparse.Namespace, run: RunFolder, resumed: tuple[Path, dict] | None
) -> tuple[list[str], VideoTable, VideoTable, VideoTable]:
    """(classes, videos to train, to validate, to test on), read by one process for all."""
    split = read_split(args)
    if args.test_only:
        split = replace(split, train=[])
    index = VideoIndex(Path(args.index_dir) / f"{args.dset}.json")
    infos = index.lookup([record.path for record in split.train + split.test], workers=cpu_count())
    report_files(None if args.test_only else run, split, infos, args.strict)
    split = drop(split, [path for path, info in infos.items() if info.error])
    if not split.test or not (split.train or args.test_only):
        raise UserError("none of the videos to train on, or none to test on, can be read; --strict names the first")
    train, val = split.train, []
    if args.val_fraction > 0 and not args.test_only:
        train, val = cut_validation(split.train, args.val_fraction, args.seed)
    tables = [VideoTable(part, [infos[record.path] for record in part]) for part in (train, val, split.test)]
    return split.classes, *tables


def read_split(args: argparse.Namespace) -> Split:
    data_root = args.data_root or DATA_ROOT[args.dset]
    annotation_path = args.annotation_path or ANNOTATION_PATH[args.dset]
    if args.dset == "demo":
        data_root, annotation_path = generate_demo(Path(data_root), DemoSettings(), workers=cpu_count())
    read = read_ucf101 if args.dset == "ucf101" else read_hmdb51
    return read(data_root, annotation_path, args.split)


# ---- network, optimizer, and where an earlier run left them ------------------------------------------


def build(
    args: argparse.Namespace, data: Data, device: torch.device, processes: Processes, resumed: tuple[Path, dict] | None
) -> TrainingState:
    network = dict(
        backbone=args.model, num_classes=len(data.classes), stride=args.stride, downsample=args.downsample,
        branches=args.branches, fusion=args.fusion, snn_batch_norm=args.snn_bn,
    )  # fmt: skip
    # The other processes take the main one's weights (Processes.replicate).
    model = ReSpike(
        **network, weights=args.weights if resumed is None and processes.is_main else None,
        lif_backend=args.lif_backend, pack_spikes=args.pack_spikes,
    )  # fmt: skip
    if args.sync_bn and processes.count > 1:
        synchronise_batch_norm(model)
    model = model.to(device, memory_format=torch.channels_last)
    print(f"network: {sum(p.numel() for p in model.parameters()):,} parameters, {len(data.classes)} classes")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=MOMENTUM, weight_decay=args.weight_decay, fused=True
    )
    # float16 needs its gradients scaled; --amp gives it on GPUs that have no bfloat16.
    scaler = torch.amp.GradScaler(device.type, enabled=choose_precision(device, args.amp) == torch.float16)
    state = TrainingState(
        model, optimizer, scaler, settings={**network, "classes": data.classes, "T": args.time},
        clips=data.clip_ids, selection=data.selection, flags={**vars(args), "processes": processes.count},
        position=TrainPosition(args.start_epoch),
    )  # fmt: skip
    if resumed is not None:
        state.restore(*resumed, NOT_TRAINING_FLAGS)
    if args.compile:
        model.compile()
    return state


if __name__ == "__main__":
    run_script(main)
