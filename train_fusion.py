"""Train ReSpike on HMDB-51, UCF-101 or the generated demo videos.

    python train_fusion.py --dset hmdb51 --model resnet50 -T 16 -b 32 -lr 0.0001 --stride 4 --downsample

Reads top to bottom: hyper-parameters, the run, its data, its network. What a flag means stands in
utils/training/flags.py, an epoch in utils/training/engine.py, a run in utils/training/fit.py.
"""

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import nn

from dataset.clips import (
    VideoTable,
    clip_ids,
    count_short,
    dense_clips,
    eval_clips,
    fingerprint,
    in_checkpoint_order,
    random_clips,
)
from dataset.demo import DEMOS, generate_demo
from dataset.device_loader import DeviceLoader, LoaderMaker
from dataset.frame_sampling import SAMPLINGS
from dataset.index import VideoIndex
from dataset.readable import readable_videos
from dataset.splits import Split, read_hmdb51, read_ucf101
from dataset.transforms import eval_short_side, eval_transforms, resized_crop
from models import FramesResNet, ReSpike, VideoResNet
from models.baselines import VIDEO_BACKBONES
from models.batch_norm import synchronise_batch_norm
from models.initial_weights import initialise
from utils.checkpoint import Checkpoint
from utils.device import cpu_count
from utils.errors import ArgumentParser, UserError
from utils.run_folder import RunFolder
from utils.runtime import Runtime
from utils.script import run_script
from utils.training.conclude import conclude, score
from utils.training.engine import TrainPosition
from utils.training.fit import Training, TrainingState, cosine_with_warmup
from utils.training.flags import add_shared_flags, begin_run, check_epoch, default_run_dir, neuron_parameters, parse

# ---- hyper-parameters: edit them here, or give the flag of the same name. --help explains each. -------
DEFAULTS = dict(
    # data
    dset="hmdb51",  # hmdb51, ucf101, demo or demo-binding
    data_root=None,  # folder of the class folders; None: DATA_SETS below
    annotation_path=None,  # folder of the split files; None: DATA_SETS below
    split=1,  # official split, 1 to 3
    val_fraction=0.0,  # share of the training videos to choose the best epoch on; 0 chooses on the test set
    # clips
    time=16,  # frames a clip (-T)
    stride=4,  # frames a segment: one key frame, the others residual
    residual="key",  # a residual frame is the frame minus its key frame; or minus the "previous" one, or "none"
    sampling="window",  # window: consecutive frames; segments: a frame of each of T equal parts (TSN)
    frame_stride=1,  # video frames from one clip frame of a window to the next
    clips_per_video="one",  # a random clip a video and epoch; "all": every window 16 frames apart (published)
    size=224,  # pixels; a multiple of 32
    flip=None,  # mirror half of the training clips; None: as DATA_SETS says
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


# ---- data sets: to add one, write a reader in dataset/splits.py and name it here ----------------------
@dataclass(frozen=True)
class DataSet:
    read: Callable[[str, str, int], Split]  # data_root, annotation_path, number of the split
    data_root: str
    annotation_path: str | None
    flip: bool = True
    crop_area: tuple[float, float] = (0.08, 1.0)  # share of the frame that a training crop takes


DATA_SETS = {
    "hmdb51": DataSet(read_hmdb51, "data/hmdb51/videos", "data/hmdb51/splits"),
    "ucf101": DataSet(read_ucf101, "data/ucf101/UCF-101", "data/ucf101/ucfTrainTestlist"),
    # A flip would swap the demo's left and right; its shapes are small already.
    "demo": DataSet(read_hmdb51, "data/demo", None, flip=False, crop_area=(0.6, 1.0)),
    # Whole frames: a crop could lose one of the halves.
    "demo-binding": DataSet(read_hmdb51, "data/demo-binding", None, flip=False, crop_area=(1.0, 1.0)),
}
PUBLISHED_CLIP_STEP = 16  # frames between the windows of --clips-per-video all


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Train ReSpike on HMDB-51, UCF-101 or generated demo videos.")
    add = parser.add_argument_group("data").add_argument
    add("--dset", choices=sorted(DATA_SETS), help="data set")
    add("--data-root", metavar="FOLDER", help="folder of the class folders; not given: DATA_SETS in this script")
    add("--annotation-path", metavar="FOLDER", help="folder of the split files; not given: DATA_SETS in this script")
    add("--split", type=int, choices=(1, 2, 3), help="official split")
    add("--clips-per-video", choices=("one", "all"), help="training clips a video and epoch: a random one, or every "
        "window 16 frames apart (as published)")  # fmt: skip
    add_shared_flags(parser)
    args = parse(parser, DEFAULTS)
    if args.dset in DEMOS and args.annotation_path is not None:
        raise UserError("--annotation-path: a demo makes its own split files, under --data-root")
    if args.dset in DEMOS and args.split != 1:
        raise UserError(f"--split {args.split}: a demo has one split, 1")
    if args.clips_per_video == "all" and args.sampling != "window":
        raise UserError("--clips-per-video all: every window of a video; it goes with --sampling window")
    args.run_dir = args.run_dir or default_run_dir(args, f"{args.dset}-split{args.split}")
    return args


def main() -> int:
    args = parse_args()
    runtime, run, checkpoint = begin_run(args)
    classes, *videos = runtime.from_main(find_videos, args, run)
    data = runtime.in_all(load_data, args, *videos, runtime, checkpoint)
    state = runtime.in_all(build, args, classes, data, runtime, checkpoint)
    checkpoint = None  # as large as the network and its optimizer
    if args.test_only:
        score(state, data.test_loader, run, state.position.epoch, data.protocol)
        return 0
    runtime.from_main(run.write_config, vars(args), network=state.settings, **runtime.described())

    training = Training(
        state, data.train_loader, data.eval_loader, nn.CrossEntropyLoss(label_smoothing=args.label_smoothing), run,
        epochs=args.epochs, evaluated_on=data.evaluated_on,
        schedule=lambda epoch: cosine_with_warmup(epoch, args.epochs, args.warmup_epochs),
        accumulation_steps=args.accumulate, clip_norm=args.clip_norm,
        checkpoint_minutes=args.checkpoint_minutes, keep=args.keep, log_every=args.log_every,
        precise_bn=args.precise_bn, cuda_graphs=args.cuda_graphs,
    )  # fmt: skip
    if training.fit():
        conclude(
            state, data.eval_loader, data.test_loader, run, evaluated_on=data.evaluated_on, protocol=data.protocol,
            counts_energy=args.energy,
        )  # fmt: skip
    run.close()
    return 0


# ---- data: split files -> what can be read -> clips -> loaders ----------------------------------------


@dataclass
class Data:
    train_loader: DeviceLoader
    clip_ids: numpy.ndarray  # and labels of the training clips, in the order that an epoch shuffles
    eval_loader: DeviceLoader  # the best epoch is chosen on these videos
    evaluated_clips: str  # fingerprint of the clips of eval_loader
    evaluated_on: str  # "val" or "test"
    test_loader: DeviceLoader
    protocol: dict  # how a test figure came about


def find_videos(
    args: argparse.Namespace, run: RunFolder | None
) -> tuple[list[str], VideoTable, VideoTable, VideoTable]:
    """(classes, videos to train, to validate, to test on). Rank 0 reads them for all. run: of the training, which
    lists what cannot be read; None: nothing is written."""
    data_set = DATA_SETS[args.dset]
    data_root = args.data_root or data_set.data_root
    annotation_path = args.annotation_path or data_set.annotation_path
    if args.dset in DEMOS and (args.test_only or run is None):
        data_root, annotation_path = Path(data_root) / "videos", Path(data_root) / "splits"
    elif args.dset in DEMOS:
        data_root, annotation_path = generate_demo(Path(data_root), DEMOS[args.dset], workers=cpu_count())
    split = data_set.read(data_root, annotation_path, args.split)
    if args.test_only:
        split = replace(split, train=[])
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

    data_set = DATA_SETS[args.dset]
    flip = data_set.flip if args.flip is None else args.flip
    clips = dense_clips(train, sampling, PUBLISHED_CLIP_STEP) if args.clips_per_video == "all" else random_clips(train)
    ids = clip_ids(train, clips)
    if checkpoint is not None and not args.test_only:
        clips, ids = in_checkpoint_order(train, clips, checkpoint)
    train_loader = make.train(train, clips, resized_crop(args.size, flip, data_set.crop_area))
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
    training = "" if args.test_only else f"training on {len(clips)} clips of {len(train)} videos; "
    print(
        f"data: {training}{f'{len(val)} to validate, ' if len(val) else ''}{len(test)} to test, "
        f"{args.views} views x {args.crops} crops each; {short} have fewer frames than a clip and repeat some"
    )
    return Data(
        train_loader, ids, eval_loader, evaluated_clips, "val" if len(val) else "test", test_loader,
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
