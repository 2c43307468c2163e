"""Train ReSpike on HMDB-51, UCF-101 or the generated demo videos.

    python train_fusion.py --dset hmdb51 --model resnet50 -T 16 -b 32 -lr 0.0001 --stride 4 --downsample

Reads top to bottom: settings, data, model, training. What the steps do lives in utils/engine.py.
"""

import argparse
import json
import os
import resource
from argparse import BooleanOptionalAction
from pathlib import Path

import torch

from dataset.demo import DemoSettings, generate_demo
from dataset.index import VideoIndex
from dataset.records import VideoRecord, cut_validation, drop, read_hmdb51, read_ucf101
from dataset.residual import check_stride
from dataset.transforms import test_transform, train_transform
from dataset.video import VideoDataset, count_looped, every_clip, make_loader, random_clips, spread_clips
from models import ReSpike
from models.resnet import BACKBONES
from models.respike import BRANCHES, FUSIONS, SIZE_MULTIPLE
from models.spiking_resnet import BATCH_NORMS
from utils.checkpoint import check_settings, load_checkpoint, save_checkpoint
from utils.engine import (
    NonFiniteLossError,
    TrainPosition,
    choose_precision,
    cosine_with_warmup,
    evaluate,
    train_one_epoch,
)
from utils.errors import ArgumentParser, UserError, run_script
from utils.pictures import key_residual_picture
from utils.run_folder import RunFolder
from utils.seed import random_state, seed_all, set_random_state
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


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train ReSpike on HMDB-51, UCF-101 or generated demo videos.")

    data = parser.add_argument_group("data")
    data.add_argument("--dset", default="hmdb51", choices=sorted(DATA_ROOT), help="data set")
    data.add_argument("--data-root", default=None, help="folder of the class folders; default DATA_ROOT above")
    data.add_argument("--annotation-path", default=None, help="folder of the split files; default ANNOTATION_PATH above")
    data.add_argument("--split", type=int, default=1, choices=(1, 2, 3), help="official split")
    data.add_argument("--val-fraction", type=float, default=0.0, help="share of the training videos, in whole source groups, to select the model on; 0 selects on the test set and says so")
    data.add_argument("-T", "--time", type=int, default=16, metavar="N", help="frames a clip; a multiple of --stride")
    data.add_argument("--stride", type=int, default=4, metavar="N", help="frames a segment: a key frame, and residual frames")
    data.add_argument("--frame-stride", type=int, default=1, metavar="N", help="frames of the video from one clip frame to the next")
    data.add_argument("--clips-per-video", default="one", choices=("one", "all"), help="training clips a video and epoch: one random window, or every window 16 frames apart (as published)")
    data.add_argument("--views", type=int, default=1, metavar="N", help="test windows a video, evenly spread, softmax averaged; 1 is centred")
    data.add_argument("--size", type=int, default=224, metavar="PIXELS", help=f"height and width of a frame; a multiple of {SIZE_MULTIPLE}")
    data.add_argument("-j", "--workers", type=int, default=min(8, len(os.sched_getaffinity(0))), metavar="N", help="data loading processes; 0 loads in the main one")
    data.add_argument("--strict", action=BooleanOptionalAction, default=False, help="fail where a video cannot be read, instead of leaving it out")
    data.add_argument("--index-dir", default=os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "respike"), help="folder of the cached video index")

    network = parser.add_argument_group("network")
    network.add_argument("--model", default="resnet18", choices=BACKBONES, help="ANN backbone")
    network.add_argument("--weights", default="default", metavar="default|none|PATH", help="backbone weights: torchvision's ImageNet weights (or one of its names for them), random, or a state dict")
    network.add_argument("--downsample", action=BooleanOptionalAction, default=False, help="fuse at all four stages, the first two at reduced size; else at stages 2 to 4 at full size")
    network.add_argument("--branches", default="both", choices=BRANCHES, help="train both branches or one alone")
    network.add_argument("--fusion", default="cross", choices=FUSIONS, help="cross-attention at every stage, or joined at the head only")
    network.add_argument("--snn-bn", default="per-step", choices=BATCH_NORMS, help="SNN batch norm: statistics per time step, or one set over all steps")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=100, metavar="N", help="total epochs")
    training.add_argument("--start_epoch", "--start-epoch", type=int, default=0, metavar="N", help="epoch to count from, for the learning rate; --resume knows its own")
    training.add_argument("-b", "--batch_size", "--batch-size", type=int, default=64, metavar="N", help="clips a batch")
    training.add_argument("-lr", "--learning_rate", "--learning-rate", type=float, default=0.01, metavar="LR", help="peak learning rate")
    training.add_argument("--weight_decay", "--weight-decay", type=float, default=1e-4, metavar="W", help="weight decay")
    training.add_argument("--warmup-epochs", type=int, default=0, metavar="N", help="epochs of linear warm-up before the cosine")
    training.add_argument("--label-smoothing", type=float, default=0.0, metavar="S", help="label smoothing, 0 to 1")
    training.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches a step")
    training.add_argument("--clip-norm", type=float, default=None, metavar="NORM", help="largest norm of the gradient; default no clipping")
    training.add_argument("--seed", type=int, default=1001, help="seed of everything random")
    training.add_argument("--amp", action=BooleanOptionalAction, default=True, help="mixed precision: bf16 where the hardware has it, fp16 on older GPUs; --no-amp is fp32")
    training.add_argument("--compile", action=BooleanOptionalAction, default=False, help="torch.compile the network")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")

    run = parser.add_argument_group("run folder")
    run.add_argument("--run-dir", "--output-dir", default=None, help="folder of this run; default runs/<what it trains>")
    run.add_argument("--resume", default=None, metavar="auto|PATH", help="continue from a checkpoint; auto: the run folder's last, if there is one")
    run.add_argument("--overwrite", action=BooleanOptionalAction, default=False, help="replace the run that the folder holds")

    args = parser.parse_args()
    check_stride(args.time, args.stride)
    if args.size < SIZE_MULTIPLE or args.size % SIZE_MULTIPLE:
        nearest = max(1, round(args.size / SIZE_MULTIPLE)) * SIZE_MULTIPLE
        raise UserError(f"--size must be a multiple of {SIZE_MULTIPLE}, got {args.size}; the nearest is {nearest}")
    for flag, low in (("frame_stride", 1), ("views", 1), ("workers", 0), ("epochs", 1), ("start_epoch", 0),
                      ("batch_size", 1), ("warmup_epochs", 0), ("accumulate", 1)):  # fmt: skip
        if getattr(args, flag) < low:
            raise UserError(f"--{flag} must be at least {low}, got {getattr(args, flag)}")
    for flag in ("val_fraction", "label_smoothing"):
        if not 0 <= getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 0 and below 1, got {getattr(args, flag)}")
    if args.resume and args.start_epoch:
        raise UserError("--start_epoch: a resumed run continues at its checkpoint's epoch; give one of the two")
    if args.run_dir is None:
        variant = "downsample" if args.downsample else "full"
        args.run_dir = f"runs/{args.dset}-{args.model}-{args.branches}-{args.fusion}-{variant}-T{args.time}-stride{args.stride}-split{args.split}-seed{args.seed}"
    return args


def main() -> int:
    args = parse_args()
    device = choose_device(args.device)
    precision = choose_precision(device, args.amp)
    seed_all(args.seed)
    run = RunFolder(Path(args.run_dir), resuming=args.resume is not None, overwrite=args.overwrite)
    print(f"run folder: {run.path}; {device}, {str(precision or torch.float32).removeprefix('torch.')}")

    # ---- data: lists -> what is on disk and readable -> clips -> loaders -------------------------------
    split = read_split(args)
    index = VideoIndex(Path(args.index_dir) / f"{args.dset}.json")
    infos = index.lookup([record.path for record in split.train + split.test], workers=len(os.sched_getaffinity(0)))
    report_files(run, split, infos, args.strict)
    split = drop(split, [path for path, info in infos.items() if info.error])
    train_records, selection_records, selected_on = split.train, split.test, "test"
    if args.val_fraction > 0:
        train_records, selection_records = cut_validation(split.train, args.val_fraction, args.seed)
        selected_on = "val"
    if not train_records or not selection_records:
        raise UserError(f"--data-root {args.data_root}: no readable video is left to train or to test on")

    def make_test_loader(records: list[VideoRecord]):
        found = [infos[record.path] for record in records]
        clips = spread_clips(found, args.time, args.frame_stride, args.views)
        dataset = VideoDataset(records, found, clips, args.time, args.frame_stride, test_transform(args.size), args.seed)
        return make_loader(dataset, args.batch_size, args.workers, shuffle=False, seed=args.seed, pin=device.type == "cuda")

    found = [infos[record.path] for record in train_records]
    if args.clips_per_video == "one":
        clips = random_clips(train_records)
    else:
        clips = every_clip(found, args.time, args.frame_stride, PUBLISHED_CLIP_STEP)
    transform = train_transform(args.size, FLIP[args.dset], CROP_AREA[args.dset])
    train_set = VideoDataset(train_records, found, clips, args.time, args.frame_stride, transform, args.seed)
    train_loader = make_loader(train_set, args.batch_size, args.workers, shuffle=True, seed=args.seed, pin=device.type == "cuda")
    selection_loader = make_test_loader(selection_records)
    looped = count_looped(list(infos.values()), args.time, args.frame_stride)
    print(f"training: {len(train_set)} clips of {len(train_records)} videos; {selected_on}: {len(selection_records)} videos x {args.views}; {looped} videos are shorter than a clip and looped")

    # ---- model and optimizer ----------------------------------------------------------------------------
    network = dict(backbone=args.model, num_classes=len(split.classes), stride=args.stride, downsample=args.downsample,
                   branches=args.branches, fusion=args.fusion, snn_batch_norm=args.snn_bn)  # fmt: skip
    checkpoint = find_checkpoint(args.resume, run)
    model = ReSpike(**network, weights=args.weights if checkpoint is None else None)
    model = model.to(device, memory_format=torch.channels_last)
    print(f"network: {sum(p.numel() for p in model.parameters()):,} parameters, {len(split.classes)} classes")
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=MOMENTUM, weight_decay=args.weight_decay, fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: cosine_with_warmup(epoch + args.start_epoch, args.epochs, args.warmup_epochs))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    position = TrainPosition(epoch=args.start_epoch)
    best = {"epoch": None, "video_top1": -1.0}

    # ---- resume -----------------------------------------------------------------------------------------
    settings = {**network, "classes": split.classes, "T": args.time}
    if checkpoint is not None:
        state = load_checkpoint(checkpoint)
        check_settings(checkpoint, state["model_settings"], settings)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        scaler.load_state_dict(state["scaler"])
        position, best = TrainPosition(**state["position"]), state["best"]
        set_random_state(state["random"])
        run.keep_epochs(position.epoch)
        print(f"resumed from {checkpoint}: epoch {position.epoch + 1}, batch {position.batches}")
        for flag, value in state["flags"].items():
            if flag not in NOT_TRAINING_FLAGS and vars(args).get(flag) != value:
                print(f"note: --{flag} was {value}, is now {vars(args).get(flag)}")
    if args.compile:
        model.compile()
    run.write_config(vars(args), network=network, classes=split.classes, device=device_name(device), precision=str(precision))

    def save(path: Path) -> None:
        save_checkpoint(path, {
            "model_settings": settings, "flags": vars(args), "position": vars(position), "best": best,
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(), "random": random_state(),
        })  # fmt: skip

    # ---- train ------------------------------------------------------------------------------------------
    def show_first_batch(key: torch.Tensor, residual: torch.Tensor) -> None:
        run.tensorboard.add_image("key_and_residual_frames", key_residual_picture(key, residual), 0)

    passes = dict(device=device, precision=precision, stride=args.stride)
    with StopRequest() as stop:
        while position.epoch < args.epochs:
            epoch = position.epoch
            try:
                trained = train_one_epoch(
                    model, train_loader, optimizer, scaler, **passes, epochs=args.epochs, position=position,
                    label_smoothing=args.label_smoothing, accumulation_steps=args.accumulate, clip_norm=args.clip_norm,
                    should_stop=lambda: stop.name is not None,
                    on_first_batch=show_first_batch if epoch == args.start_epoch else None,
                )  # fmt: skip
            except NonFiniteLossError as error:
                save(run.path / "nonfinite.pt")
                raise UserError(f"epoch {epoch + 1}, batch {position.batches + 1}: {error}; the state before is in {run.path / 'nonfinite.pt'}; try a lower -lr, --clip-norm or --no-amp") from error
            scored = None
            if trained is not None:
                scored = evaluate(model, selection_loader, len(split.classes), **passes, task=f"{selected_on} {epoch + 1}", should_stop=lambda: stop.name is not None)
            if scored is None:
                save(run.last)
                print(f"stopped by {stop.name} in epoch {epoch + 1} after batch {position.batches}; continue with --resume auto")
                run.close()
                return 0

            improved = scored["video_top1"] > best["video_top1"]
            if improved:
                best = {"epoch": epoch, "video_top1": scored["video_top1"]}
            run.add_metrics({
                "epoch": epoch, **trained, f"{selected_on}_loss": scored["loss"],
                **{name: scored[name] for name in ("clip_top1", "clip_top5", "video_top1", "video_top5", "firing_rate")},
                "evaluated_on": selected_on, "learning_rate": scheduler.get_last_lr()[0], "peak_memory_bytes": peak_memory_bytes(device),
            })  # fmt: skip
            print(f"epoch {epoch + 1}/{args.epochs}: loss {trained['train_loss']:.4f}, train clip top-1 {trained['train_clip_top1']:.1f} %, {selected_on} clip {scored['clip_top1']:.1f} %, video {scored['video_top1']:.1f} %, {trained['clips_per_second']:.1f} clips/s, {100 * trained['data_wait_share']:.0f} % waiting for data", flush=True)
            position = TrainPosition(epoch=epoch + 1)
            scheduler.step()
            if improved:
                save(run.best)
            save(run.last)

    # ---- result -----------------------------------------------------------------------------------------
    if selected_on == "val":
        model.load_state_dict(load_checkpoint(run.best)["model"])
        scored = evaluate(model, make_test_loader(split.test), len(split.classes), **passes, task="test")
        print(f"test of epoch {best['epoch'] + 1}, selected on validation videos: clip top-1 {scored['clip_top1']:.2f} %, video top-1 {scored['video_top1']:.2f} %, top-5 {scored['video_top5']:.2f} % of {scored['videos']} videos")
        (run.path / "test.json").write_text(json.dumps({"epoch": best["epoch"], **scored}, indent=2) + "\n")
    else:
        print(f"best test video top-1 {best['video_top1']:.2f} % at epoch {best['epoch'] + 1}: selected on the test set itself, so optimistic; --val-fraction selects without it")
    run.close()
    return 0


# ---------------------------------------------------------------------------------------------------
# Flags that may differ between a run and its continuation without a word.
NOT_TRAINING_FLAGS = {"resume", "run_dir", "overwrite", "workers", "index_dir", "weights", "device", "data_root", "annotation_path"}


def choose_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected cuda, cuda:N or cpu") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: expected cuda, cuda:N or cpu")
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory the run has held: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_split(args: argparse.Namespace):
    data_root = args.data_root or DATA_ROOT[args.dset]
    annotation_path = args.annotation_path or ANNOTATION_PATH[args.dset]
    if args.dset == "demo":
        data_root, annotation_path = generate_demo(Path(data_root), DemoSettings(), workers=len(os.sched_getaffinity(0)))
    read = read_ucf101 if args.dset == "ucf101" else read_hmdb51
    return read(data_root, annotation_path, args.split)


def report_files(run: RunFolder, split, infos: dict, strict: bool) -> None:
    """Say which files are missing, not listed or not readable, and keep the lists in the run folder."""
    print(f"data: {split.classes_on_disk()} of {len(split.classes)} classes have videos on disk")
    unreadable = [info.error for info in infos.values() if info.error]
    damaged = [path for path, info in infos.items() if info.damaged_packets]
    for name, lines, meaning in (
        ("missing", split.missing, "listed videos are not on disk"),
        ("unlisted", split.unlisted, "videos on disk are on no list"),
        ("unreadable", unreadable, "videos cannot be read and are left out"),
        ("damaged", damaged, "videos have damaged packets; their decodable frames are used"),
    ):
        if lines:
            file = run.write_list(f"{name}.txt", lines)
            print(f"{len(lines)} {meaning}, the first: {lines[0]} (all in {file})")
    if unreadable and strict:
        raise UserError(f"--strict: {len(unreadable)} videos cannot be read, the first: {unreadable[0]}")


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
