"""Train ReSpike on Kinetics-400, or on any videos that list files name.

    python train_kinetics.py --dset kinetics400 -b 16 -T 16 --stride 2 -lr 0.0001 --model resnet50 -j 8 --downsample
    torchrun --nproc-per-node 8 train_kinetics.py ...

Reads top to bottom, as train_fusion.py does: hyper-parameters, the run, its data, its network. What a flag means
stands in utils/training/flags.py, an epoch in utils/training/engine.py, a run in utils/training/fit.py.
"""

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import nn

from dataset.clips import VideoTable, clip_ids, count_short, eval_clips, fingerprint, in_checkpoint_order, random_clips
from dataset.device_loader import DeviceLoader, LoaderMaker
from dataset.frame_sampling import SAMPLINGS
from dataset.index import VideoIndex
from dataset.label_map import read_label_map
from dataset.lists import VideoList, read_lists
from dataset.readable import readable_videos
from dataset.transforms import eval_short_side, eval_transforms, multi_scale_crop
from models import FramesResNet, ReSpike, VideoResNet
from models.baselines import VIDEO_BACKBONES
from models.batch_norm import synchronise_batch_norm
from models.initial_weights import initialise
from utils.checkpoint import Checkpoint
from utils.errors import ArgumentParser, UserError
from utils.run_folder import RunFolder
from utils.runtime import Runtime
from utils.script import run_script
from utils.training.conclude import conclude, score
from utils.training.engine import TrainPosition
from utils.training.fit import Training, TrainingState, cosine_with_warmup
from utils.training.flags import (
    add_shared_flags,
    begin_run,
    check_epoch,
    default_run_dir,
    neuron_parameters,
    parse,
    whole,
)

# ---- hyper-parameters: edit them here, or give the flag of the same name. --help explains each. -------
DEFAULTS = dict(
    # data
    dset="kinetics400",  # kinetics400, or list: whatever the lists name
    train_list=None,  # lines `path label`, `path frames label`, or the official csv; None: KINETICS400 below
    val_list=None,  # the same for the videos to test on
    data_root=None,  # folder that the paths of both lists start from; None: KINETICS400 below, or the list's folder
    train_root=None,  # the same for train_list alone
    val_root=None,  # the same for val_list alone
    label_map=None,  # file of class names, one a line, label 0 first; or with their numbers
    num_classes=None,  # None: of the label map, or as many as the labels need
    val_fraction=0.0,  # share of the training videos to choose the best epoch on; 0 chooses on the videos of val_list
    # clips
    time=16,  # frames a clip (-T)
    stride=4,  # frames a segment: one key frame, the others residual
    residual="key",  # a residual frame is the frame minus its key frame; or minus the "previous" one, or "none"
    sampling="segments",  # segments: a frame of each of T equal parts (TSN); window: consecutive frames
    frame_stride=1,  # video frames from one clip frame of a window to the next
    size=224,  # pixels; a multiple of 32
    flip=True,  # mirror half of the training clips; not if left and right are the label
    views=1,  # test clips a video
    crops=1,  # test crops a view: 1 or 3
    workers=None,  # data loading processes (-j); None: one a core, 8 at most
    strict=False,  # stop at a video that cannot be read
    verify="quick",  # first look at a video file; "full" decodes every file
    # network
    model="resnet18",  # resnet18, 34, 50, 101 or 152; to compare with: r3d_18, mc3_18, r2plus1d_18
    weights="default",  # ImageNet weights of torchvision; "none", or the path of a state dict
    init=None,  # start from the weights of another run: its checkpoint
    freeze=None,  # "ann": the ANN branch stays as it is
    downsample=False,  # fuse at all four stages, the first two at reduced size; else at stages 2 to 4
    branches="both",  # or "ann", "snn"; "frames": the ResNet alone on every frame, to compare with
    fusion="cross",  # cross-attention; or "film", "lean", "concat"
    snn_bn="per-step",  # batch norm statistics of each time step, one set in testing; or "merged", "through-time"
    neuron="lif",  # a name in models/neurons.py, or sj.NAME of SpikingJelly (--help lists them)
    neuron_args=None,  # of a neuron of SpikingJelly, as "v_threshold=0.8,detach_reset=True"
    tau=4 / 3,  # membrane time constant, in time steps
    surrogate="atan",  # or "sigmoid", "triangle"
    alpha=2.0,  # steepness of the surrogate gradient
    # optimization: SGD, the learning rate falls to zero along a cosine
    epochs=100,
    start_epoch=0,
    batch_size=64,  # clips a batch and process (-b)
    learning_rate=0.01,  # peak (-lr); not scaled with the batch
    momentum=0.9,
    weight_decay=1e-4,
    warmup_epochs=0,
    label_smoothing=0.0,
    accumulate=1,  # batches an optimizer step
    clip_norm=None,  # largest norm of the gradient; None: not clipped
    seed=1001,
    # how it is computed
    amp=True,  # mixed precision
    sync_bn=False,  # batch norm statistics over all processes
    precise_bn=0,  # training clips to measure batch norm's statistics on before each evaluation; 0: the running ones
    lif_backend="auto",  # fused GPU kernels if there is a GPU; or "triton", "reference", "spikingjelly"
    pack_spikes=False,  # one bit a spike kept for the backward pass
    deterministic=False,
    compile=False,
    cuda_graphs=False,  # for small batches: the host launches two graphs a batch instead of thousands of kernels
    device=None,  # None: cuda if there is a GPU
    # run folder
    run_dir=None,  # None: named for what it trains, in runs/
    checkpoint_minutes=15.0,  # between checkpoints in mid-epoch
    keep=2,  # newest checkpoints kept
    log_every=50,  # optimizer steps between lines of steps.jsonl
    energy=True,  # at the end, count the spikes of the test clips and estimate the energy of a clip
)


# ---- where Kinetics-400 is; flags of these names come first -------------------------------------------
KINETICS400 = dict(
    train_list="data/kinetics400/kinetics400_train_list_videos.txt",
    val_list="data/kinetics400/kinetics400_val_list_videos.txt",
    train_root="data/kinetics400/videos_train",
    val_root="data/kinetics400/videos_val",
)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train ReSpike on Kinetics-400 or on any videos that list files name.")
    add = parser.add_argument_group("data").add_argument
    add("--dset", choices=("kinetics400", "list"), help="Kinetics-400, or what the lists name")
    add("--train-list", metavar="FILE", help="lines `path label`, `path frames label`, or a csv with a header")
    add("--val-list", metavar="FILE", help="the same for the videos to test on")
    add("--data-root", metavar="FOLDER", help="folder that the paths of both lists start from; not given: of "
        "KINETICS400 in this script, or the list's own")  # fmt: skip
    add("--train-root", metavar="FOLDER", help="the same for --train-list alone")
    add("--val-root", metavar="FOLDER", help="the same for --val-list alone")
    add("--label-map", metavar="FILE", help="class names, one a line, label 0 first; or with their numbers")
    add("--num-classes", type=whole(1, below=100_000), metavar="N", help="not given: as many as needed")
    add_shared_flags(parser)
    args = parse(parser, DEFAULTS)
    if args.dset == "kinetics400":
        args.train_list = args.train_list or KINETICS400["train_list"]
        args.val_list = args.val_list or KINETICS400["val_list"]
    if args.train_list is None and not args.test_only:
        raise UserError("--train-list: --dset list needs it, a file of lines `path label`")
    if args.val_list is None:
        raise UserError("--val-list: --dset list needs it, a file of lines `path label`")
    if args.run_dir is None:
        if args.train_list is None:
            raise UserError("--run-dir: --resume auto without --train-list, which names the folder, needs it")
        args.run_dir = default_run_dir(args, Path(args.train_list).stem if args.dset == "list" else args.dset)
    return args


def main() -> int:
    args = parse_args()
    runtime, run, checkpoint = begin_run(args)
    classes, *videos = runtime.from_main(find_videos, args, run, checkpoint)
    data = runtime.in_all(load_data, args, *videos, runtime, checkpoint)
    state = runtime.in_all(build, args, classes, data, runtime, checkpoint)
    checkpoint = None  # as large as the network and its optimizer
    if args.test_only:
        score(state, data.test_loader, run, state.position.epoch, data.protocol)
        return 0
    runtime.from_main(run.write_config, vars(args), network=state.settings, **runtime.described())

    training = Training(
        state, data.train_loader, data.eval_loader, nn.CrossEntropyLoss(label_smoothing=args.label_smoothing), run,
        epochs=args.epochs, evaluated_on="val",
        schedule=lambda epoch: cosine_with_warmup(epoch, args.epochs, args.warmup_epochs),
        accumulation_steps=args.accumulate, clip_norm=args.clip_norm,
        checkpoint_minutes=args.checkpoint_minutes, keep=args.keep, log_every=args.log_every,
        precise_bn=args.precise_bn, cuda_graphs=args.cuda_graphs,
    )  # fmt: skip
    if training.fit():
        conclude(
            state, data.eval_loader, data.test_loader, run, evaluated_on="val", protocol=data.protocol,
            counts_energy=args.energy,
        )  # fmt: skip
    run.close()
    return 0


# ---- data: lists -> what can be read -> clips -> loaders ----------------------------------------


@dataclass
class Data:
    train_loader: DeviceLoader
    clip_ids: numpy.ndarray  # and labels of the training clips, in the order that an epoch shuffles
    eval_loader: DeviceLoader  # the best epoch is chosen on these videos
    evaluated_clips: str  # fingerprint of the clips of eval_loader
    test_loader: DeviceLoader
    protocol: dict  # how a test figure came about


def find_videos(
    args: argparse.Namespace, run: RunFolder | None, checkpoint: Checkpoint | None
) -> tuple[list[str], VideoTable, VideoTable, VideoTable]:
    """(classes, videos to train, to validate, to test on). Rank 0 reads them for all. run: of the training, which
    lists what cannot be read; None: nothing is trained or written, and the classes are those of the checkpoint."""

    def named(part: str) -> VideoList:
        file = Path(getattr(args, f"{part}_list"))
        usual = KINETICS400[f"{part}_root"] if args.dset == "kinetics400" else file.parent
        return VideoList(part, file, Path(getattr(args, f"{part}_root") or args.data_root or usual))

    class_names = None
    if args.label_map is not None:
        class_names = read_label_map(Path(args.label_map))
    elif args.test_only or run is None:  # a list of few videos need not name all classes
        class_names = checkpoint.classes
    split = read_lists(None if args.test_only else named("train"), named("val"), class_names, args.num_classes)
    index = VideoIndex(Path(args.index_dir) / f"{args.dset}.json", verify_full=args.verify == "full")
    write_list = None if args.test_only or run is None else run.write_list
    return split.classes, *readable_videos(split, index, args.strict, write_list, args.val_fraction, args.seed)


def load_data(
    args: argparse.Namespace, train: VideoTable, val: VideoTable, test: VideoTable, runtime: Runtime,
    checkpoint: Checkpoint | None,
) -> Data:  # fmt: skip
    """Clips and loaders. The training clips of a continued run stand in the checkpoint's order."""
    sampling = SAMPLINGS[args.sampling](args.time, args.frame_stride, args.views)
    make = LoaderMaker(
        sampling, args.stride, args.residual, args.batch_size, args.workers, args.seed, args.strict, runtime
    )

    clips = random_clips(train)
    ids = clip_ids(train, clips)
    if checkpoint is not None and not args.test_only:
        clips, ids = in_checkpoint_order(train, clips, checkpoint)
    train_loader = make.train(train, clips, multi_scale_crop(args.size, args.flip))
    check_epoch(args, train_loader, runtime)

    def test_on(videos: VideoTable) -> tuple[DeviceLoader, str]:
        clips = eval_clips(videos, sampling, args.crops)
        loader = make.eval(videos, clips, eval_transforms(args.size, eval_short_side(args.size, args.dset), args.crops))
        return loader, fingerprint(videos, clips)

    test_loader, evaluated_clips = test_on(test)
    eval_loader = test_loader
    if len(val):
        eval_loader, evaluated_clips = test_on(val)
    short = sum(count_short(videos, sampling) for videos in (train, val, test))
    training = "" if args.test_only else f"training on {len(clips)} videos; "
    print(
        f"data: {training}{f'{len(val)} to validate, ' if len(val) else ''}{len(test)} to test, "
        f"{args.views} views x {args.crops} crops each; {short} have fewer frames than a clip and repeat some"
    )
    return Data(
        train_loader, ids, eval_loader, evaluated_clips, test_loader,
        protocol=dict(
            sampling=args.sampling, frames=args.time, frame_stride=args.frame_stride, views=args.views,
            crops=args.crops, size=args.size,
        ),
    )  # fmt: skip


# ---- network, optimizer, and the state that an earlier run left ---------------------------------------


def build(
    args: argparse.Namespace, classes: list[str], data: Data, runtime: Runtime, checkpoint: Checkpoint | None
) -> TrainingState:
    """The network on the device and its optimizer, as new or as the checkpoint holds them."""
    starts = checkpoint is None and runtime.is_main  # other ranks take the weights of rank 0
    weights = args.weights if starts and args.init is None else None
    network = dict(backbone=args.model, num_classes=len(classes))
    if args.model in VIDEO_BACKBONES:
        model = VideoResNet(**network, weights=weights)
    elif args.branches == "frames":
        model = FramesResNet(**network, weights=weights, lif_backend=args.lif_backend)
    else:
        network |= dict(
            stride=args.stride, downsample=args.downsample, branches=args.branches, fusion=args.fusion,
            snn_batch_norm=args.snn_bn,
        )  # fmt: skip
        model = ReSpike(
            **network, neuron=neuron_parameters(args), neuron_type=args.neuron, neuron_args=args.neuron_args,
            weights=weights, lif_backend=args.lif_backend, pack_spikes=args.pack_spikes,
        )  # fmt: skip
        network |= dict(
            neuron=args.neuron, neuron_args=args.neuron_args or {}, tau=args.tau, surrogate=args.surrogate,
            alpha=args.alpha,
        )  # fmt: skip
    settings = network | dict(
        network=type(model).__name__, classes=classes, T=args.time, stride=args.stride, residual=args.residual
    )
    if checkpoint is not None and args.init is not None:
        print(f"note: --init is not used: the run continues from {checkpoint.path}")
    if starts and args.init is not None:
        print(initialise(model, settings, Path(args.init)))
    if args.freeze == "ann":
        model.freeze_ann()
    if args.sync_bn and runtime.count > 1:
        synchronise_batch_norm(model)
    model = model.to(runtime.device, memory_format=model.memory_format)
    print(f"network: {sum(p.numel() for p in model.parameters()):,} parameters, {len(classes)} classes")
    # float16 needs its gradients scaled; --amp chooses it on GPUs that have no bfloat16. The first steps overflow, and
    # fused SGD would then keep a momentum that nobody has written.
    scaled = runtime.precision == torch.float16
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay,
        fused=not scaled,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=scaled)
    state = TrainingState(
        model, optimizer, scaler, runtime, settings, clip_ids=data.clip_ids, evaluated_clips=data.evaluated_clips,
        flags=vars(args), position=TrainPosition(args.start_epoch),
    )  # fmt: skip
    if checkpoint is not None:
        state.restore(checkpoint)
    if args.compile:
        model.compile()
    return state


if __name__ == "__main__":
    run_script(main)
