"""Train ReSpike on Kinetics-400, or on any videos that list files name, on one GPU or several.

    python train_kinetics.py --dset kinetics400 -b 16 -T 16 --stride 2 -lr 0.0001 --model resnet50 -j 8 --downsample
    torchrun --nproc-per-node 8 train_kinetics.py ...

Reads top to bottom, as train_fusion.py does: settings, the run, its data, its network. What a run does
with them lives in utils/fit.py (epochs, checkpoints) and utils/engine.py (one epoch).
"""

import argparse
import os
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch.utils.data import DataLoader

from dataset.batch_sampler import EvalBatchSampler, TrainBatchSampler
from dataset.clips import VideoTable, clip_ids, count_short, eval_clips, fingerprint, random_clips
from dataset.frame_sampling import SegmentSampling, WindowSampling
from dataset.index import VideoIndex
from dataset.lists import VideoList, read_label_map, read_lists
from dataset.readable import report_files
from dataset.splits import drop
from dataset.transforms import CROP_POSITIONS, eval_transforms, multi_scale_crop
from dataset.video import VideoDataset, make_loader
from models import ReSpike
from models.batch_norm import BATCH_NORMS, synchronise_batch_norm
from models.neurons import BACKENDS, runs_on_triton
from models.resnet import BACKBONES
from models.respike import BRANCHES, FUSIONS
from utils.checkpoint import find_checkpoint
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
# Where the data set is; the flags of these names override. --dset list has no place of its own.
TRAIN_LIST = {"kinetics400": "data/kinetics400/kinetics400_train_list_videos.txt"}
VAL_LIST = {"kinetics400": "data/kinetics400/kinetics400_val_list_videos.txt"}
TRAIN_ROOT = {"kinetics400": "data/kinetics400/videos_train"}
VAL_ROOT = {"kinetics400": "data/kinetics400/videos_val"}
SHORT_SIDE = 256 / 224  # of the frames that test crops are taken from, in crop sizes
MOMENTUM = 0.9
# Flags that may differ between a run and its continuation without a word.
NOT_TRAINING_FLAGS = {
    "resume", "run_dir", "overwrite", "workers", "index_dir", "weights", "device", "train_list", "val_list",
    "data_root", "train_root", "val_root", "checkpoint_minutes", "keep", "test_only",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train ReSpike on Kinetics-400 or on any videos that list files name.")
    yes_no = BooleanOptionalAction
    cores = max(1, cpu_count() // local_processes())
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dset", default="kinetics400", choices=("kinetics400", "list"), help="Kinetics-400, or what the lists name")
    add("--train-list", help="`path label`, `path frames label` or the official csv; default: TRAIN_LIST here")
    add("--val-list", help="the same for the videos to test on; default: VAL_LIST here")
    add("--data-root", help="folder the lists' paths start from; default: TRAIN_ROOT, VAL_ROOT here, or the list's")
    add("--train-root", help="the same for --train-list alone")
    add("--val-root", help="the same for --val-list alone")
    add("--label-map", metavar="FILE", help="class names, one a line; label 0 is the first")
    add("--num-classes", type=int, metavar="N", help="default: the label map's, or as the labels need")
    add("-T", "--time", type=int, default=16, metavar="N", help="frames a clip; a multiple of --stride")
    add("--stride", type=int, default=4, metavar="N", help="frames a segment: one key frame, the others residual")
    add("--sampling", default="segments", choices=("segments", "window"),
        help="a frame of each of T equal parts (TSN): random in training, the middle one in testing; or a window")
    add("--frame-stride", type=int, default=1, metavar="N", help="--sampling window: video frames between clip frames")
    add("--views", type=int, default=1, metavar="N", help="test clips a video, spread; their softmax is averaged")
    add("--crops", type=int, default=1, choices=sorted(CROP_POSITIONS),
        help="test crops a view: the centre, or three along the longer side")
    add("--flip", action=yes_no, default=True, help="flip half the training clips; not where left and right matter")
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
    for flag, default in {"train_list": TRAIN_LIST, "val_list": VAL_LIST}.items():
        needed = not (args.test_only and flag == "train_list")
        if needed and getattr(args, flag) is None and args.dset not in default:
            raise UserError(f"--{flag.replace('_', '-')}: --dset {args.dset} needs it, a file of lines `path label`")
    if args.num_classes is not None and args.num_classes < 1:
        raise UserError(f"--num-classes must be at least 1, got {args.num_classes}")
    if args.sampling == "segments" and args.frame_stride != 1:
        raise UserError("--frame-stride: segments cover the whole video; it goes with --sampling window")
    if args.run_dir is None and args.test_only and args.resume != "auto":
        args.run_dir = str(Path(args.resume).parent)
    if args.run_dir is None:
        if args.dset == "list" and args.train_list is None:
            raise UserError("--run-dir: --resume auto without --train-list, which names the folder, needs it")
        name = args.dset if args.dset != "list" else Path(args.train_list).stem
        variant = "downsample" if args.downsample else "full"
        args.run_dir = (
            f"runs/{name}-{args.model}-{args.branches}-{args.fusion}-{variant}"
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
            state.model, data.val_loader, len(data.classes), run, **passes, epoch=state.position.epoch, **data.protocol
        )
        return 0
    config = dict(
        network=state.settings, device=device_name(device), precision=str(precision), processes=processes.count
    )
    processes.from_main(lambda: run.write_config(vars(args), **config))

    finished = fit(
        state, data.train_loader, data.val_loader, run, **passes, epochs=args.epochs,
        learning_rate=lambda epoch: args.learning_rate * cosine_with_warmup(epoch, args.epochs, args.warmup_epochs),
        classes=len(data.classes), selected_on="val", label_smoothing=args.label_smoothing,
        accumulation_steps=args.accumulate, clip_norm=args.clip_norm,
        checkpoint_minutes=args.checkpoint_minutes, keep=args.keep,
    )  # fmt: skip
    if finished and state.best["epoch"] is None:
        print(f"no epoch was left to train: the checkpoint is at epoch {state.position.epoch} of {args.epochs}")
    elif finished:
        print(
            f"best val video top-1 {state.best['video_top1']:.2f} % at epoch {state.best['epoch'] + 1}, "
            f"{args.views} x {args.crops} clips a video: selected on the videos it is measured on"
        )
    run.close()
    return 0


# ---- data: lists -> what is on disk and readable -> clips -> loaders ---------------------------------


@dataclass
class Data:
    classes: list[str]
    train_loader: DataLoader
    clip_ids: numpy.ndarray  # of the training clips, in the order that an epoch shuffles
    val_loader: DataLoader
    selection: str  # names the clips that the best epoch is chosen on
    protocol: dict  # how a test figure came about


def load_data(
    args: argparse.Namespace, classes: list[str], train: VideoTable, val: VideoTable,
    processes: Processes, resumed: tuple[Path, dict] | None, pin: bool,
) -> Data:  # fmt: skip
    sampling = SegmentSampling(args.time, args.views)
    if args.sampling == "window":
        sampling = WindowSampling(args.time, args.frame_stride, args.views)
    dataset = dict(sampling=sampling, seed=args.seed, strict=args.strict)
    share = dict(rank=processes.rank, processes=processes.count)

    clips = random_clips(train)
    names = clip_ids(train, clips)
    if resumed is not None and not args.test_only:
        clips, names = in_checkpoint_order(train, clips, *resumed)
    if len(clips) < processes.count and not args.test_only:
        raise UserError(f"{len(clips)} training clips cannot be shared out to {processes.count} processes; start fewer")
    transforms = [multi_scale_crop(args.size, args.flip)]
    batches = TrainBatchSampler(len(clips), args.batch_size, args.seed, **share)
    train_loader = make_loader(VideoDataset(train, clips, transforms=transforms, **dataset), batches, args.workers, pin)

    val_clips = eval_clips(val, sampling, args.crops)
    transforms = eval_transforms(args.size, round(args.size * SHORT_SIDE), args.crops)
    batches = EvalBatchSampler(val_clips, args.batch_size, **share)
    val_loader = make_loader(VideoDataset(val, val_clips, transforms=transforms, **dataset), batches, args.workers, pin)

    short = count_short(train, sampling) + count_short(val, sampling)
    print(
        f"data: training on {len(clips)} videos; {len(val)} to test, {args.views} views x {args.crops} crops each; "
        f"{short} have fewer frames than a clip and repeat some"
    )
    print(
        f"an optimizer step: {processes.count} x {args.accumulate} x {args.batch_size} clips (processes, batches, -b)"
    )
    protocol = dict(sampling=args.sampling, frames=args.time, views=args.views, crops=args.crops, size=args.size)
    return Data(classes, train_loader, names, val_loader, fingerprint(val, val_clips), protocol)


def find_videos(
    args: argparse.Namespace, run: RunFolder, resumed: tuple[Path, dict] | None
) -> tuple[list[str], VideoTable, VideoTable]:
    """(classes, videos to train on, to test on), read by one process for all."""

    def named(part: str, lists: dict, roots: dict) -> VideoList:
        file = Path(getattr(args, f"{part}_list") or lists[args.dset])
        root = getattr(args, f"{part}_root") or args.data_root or roots.get(args.dset, file.parent)
        return VideoList(part, file, Path(root))

    train = None if args.test_only else named("train", TRAIN_LIST, TRAIN_ROOT)
    class_names = None
    if args.label_map is not None:
        class_names = read_label_map(Path(args.label_map))
    elif args.test_only:  # a list of few videos need not name all classes
        class_names = resumed[1]["model_settings"]["classes"]
    split = read_lists(train, named("val", VAL_LIST, VAL_ROOT), class_names, args.num_classes)
    index = VideoIndex(Path(args.index_dir) / f"{args.dset}.json")
    infos = index.lookup([record.path for record in split.train + split.test], workers=cpu_count())
    report_files(None if args.test_only else run, split, infos, args.strict)
    split = drop(split, [path for path, info in infos.items() if info.error])
    if not split.test or not (split.train or args.test_only):
        raise UserError("none of the videos to train on, or none to test on, can be read; --strict names the first")
    tables = [VideoTable(part, [infos[record.path] for record in part]) for part in (split.train, split.test)]
    return split.classes, *tables


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
