"""The command line of the training scripts: the flags that both share, and what is set up before data and network.

A flag's meaning, type and range stand here, once. Its default stands in `DEFAULTS` at the top of the script.
"""

import argparse
import ast
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dataset.device_loader import DeviceLoader
from dataset.frame_sampling import SAMPLINGS
from dataset.residual import RESIDUALS, check_stride
from dataset.transforms import CROP_POSITIONS
from models.baselines import VIDEO_BACKBONES
from models.batch_norm import BATCH_NORMS
from models.kernels.parameters import LIFParameters
from models.kernels.surrogates import SURROGATES
from models.neurons import BACKENDS, NEURONS, runs_on_triton
from models.resnet import BACKBONES
from models.respike import BRANCHES, FUSIONS, SIZE_MULTIPLE
from models.spikingjelly_neurons import neuron_factory, spikingjelly_names
from utils.checkpoint import Checkpoint, find_checkpoint
from utils.device import choose_algorithms, cpu_count, device_name, seed_all
from utils.errors import ArgumentParser, UserError
from utils.files import cache_folder
from utils.run_folder import RunFolder, continues_run
from utils.runtime import Runtime, join_run, local_processes

# A continuation of a run may change these without a note: they do not change what is trained.
NOT_TRAINING_FLAGS = {
    "resume", "run_dir", "overwrite", "workers", "index_dir", "verify", "weights", "init", "device", "data_root",
    "annotation_path", "train_list", "val_list", "train_root", "val_root", "checkpoint_minutes", "keep", "log_every",
    "test_only", "energy", "lif_backend", "pack_spikes", "cuda_graphs", "deterministic",
}  # fmt: skip
# Flags that have no part in the networks to compare with. Whoever gives one believes that it counts: it is refused.
_OF_RESPIKE = (
    "stride", "residual", "freeze", "downsample", "fusion", "snn_bn", "neuron", "neuron_args", "tau", "surrogate",
    "alpha", "pack_spikes",
)  # fmt: skip
# Of the project's own batch norms and branches, which torchvision's video networks do not have.
_OF_RESNETS = ("branches", "lif_backend", "sync_bn", "precise_bn")
# Values a channel and batch. On 32 pixels at -lr 0.001, two clips of one key frame end in NaN within 50 steps; the same
# two among 24 that only add to the statistics do not. At -lr 0.01 so few clips are too few for a step as well.
_FEW_VALUES = 16
_YES_NO = argparse.BooleanOptionalAction


def whole(least: int, below: int | None = None) -> Callable[[str], int]:
    """The type of a flag: a whole number of at least `least`, and below `below`."""

    def convert(text: str) -> int:
        return _in_range(int(text), least, below)

    convert.__name__ = "int"  # argparse: invalid int value
    return convert


def number(least: float, below: float | None = None) -> Callable[[str], float]:
    """The type of a flag: a finite number of at least `least`, and below `below`."""

    def convert(text: str) -> float:
        return _in_range(float(text), least, below)

    convert.__name__ = "float"
    return convert


def keyword_arguments(text: str) -> dict:
    """The type of a flag: "tau=2.0,decay_input=False" -> {"tau": 2.0, "decay_input": False}. A value that is neither a
    number, True, False nor None is a word."""
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.strip().partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise argparse.ArgumentTypeError(f"must be NAME=VALUE,... with each name once, got {text!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _in_range(value: float, least: float, below: float | None) -> float:
    if not (value >= least and math.isfinite(value) and (below is None or value < below)):
        bound = "" if below is None else f" and below {below}"
        raise argparse.ArgumentTypeError(f"must be at least {least}{bound}, got {value}")
    return value


def add_shared_flags(parser: ArgumentParser) -> None:
    """Every flag that both training scripts have."""
    _add_clip_flags(parser.add_argument_group("clips").add_argument)
    _add_network_flags(parser.add_argument_group("network").add_argument)
    training = parser.add_argument_group("training").add_argument
    _add_optimisation_flags(training)
    _add_computing_flags(training)
    _add_run_folder_flags(parser.add_argument_group("run folder").add_argument)


# fmt: off
def _add_clip_flags(add: Callable) -> None:
    add("-T", "--time", type=whole(1), metavar="N", help="frames a clip; a multiple of --stride")
    add("--stride", type=whole(1), metavar="N", help="frames a segment: one key frame, the others residual")
    add("--residual", choices=RESIDUALS,
        help="a residual frame is the frame minus its key frame, minus the previous frame, or the frame as it is")
    add("--sampling", choices=sorted(SAMPLINGS),
        help="segments: a frame of each of T equal parts of the video (TSN); window: T consecutive frames")
    add("--frame-stride", type=whole(1), metavar="N",
        help="--sampling window: video frames from one clip frame to the next")
    add("--size", type=whole(SIZE_MULTIPLE), metavar="PIXELS", help="height and width; a multiple of 32")
    add("--flip", action=_YES_NO, help="mirror half of the training clips; not if left and right are the label")
    add("--views", type=whole(1), metavar="N", help="test clips a video, evenly spread; their softmax is averaged")
    add("--crops", type=int, choices=sorted(CROP_POSITIONS),
        help="test crops a view: the centre, or three along the longer side")
    add("--val-fraction", type=number(0, below=1), metavar="SHARE",
        help="training videos, in whole source groups, to choose the best epoch on; 0 chooses on the test videos")
    add("--strict", action=_YES_NO, help="stop at a video that cannot be read; else it is left out and listed")
    add("-j", "--workers", type=whole(0), metavar="N",
        help="data loading processes of each training process; 0 loads in the training process")
    add("--index-dir", metavar="FOLDER", help="folder of the cached video index")
    add("--verify", choices=("quick", "full"),
        help="first look at a video file: quick counts its packets if they can be trusted; full decodes every file")


def _add_network_flags(add: Callable) -> None:
    add("--model", choices=(*BACKBONES, *VIDEO_BACKBONES),
        help="backbone of the ANN branch; r3d_18, mc3_18 and r2plus1d_18 are video networks to compare with, on all T "
        "frames as one clip")
    add("--weights", metavar="default|none|PATH",
        help="backbone weights: of torchvision for ImageNet, for Kinetics-400 if it is a video network (or the name of "
        "one of them), random, or a state dict")
    add("--init", metavar="FILE",
        help="start from the weights of another run: a checkpoint, a .safetensors file, or a state dict; the head is "
        "new if the classes differ")
    add("--freeze", choices=("ann",), help="keep the ANN branch as it is: neither weights nor statistics change")
    add("--downsample", action=_YES_NO,
        help="fuse at all four stages, the first two at reduced size; else at stages 2 to 4 at full size")
    add("--branches", choices=(*BRANCHES, "frames"),
        help="both branches, or one alone; frames: to compare with, the ResNet on all T frames, averaged (TSN)")
    add("--fusion", choices=FUSIONS,
        help="cross-attention (published); gain and shift by place; attention at a small part of the cost; or joined "
        "at the head only")
    add("--snn-bn", choices=BATCH_NORMS,
        help="SNN batch norm: statistics of each time step in training and one set for all in testing (published), one "
        "set for all in both, or of each time step in both")
    # Finding SpikingJelly's takes seconds.
    names = ", ".join(spikingjelly_names() if {"-h", "--help"} & set(sys.argv[1:]) else [])
    add("--neuron", metavar="NAME",
        help=f"type of the spiking neuron: {', '.join(sorted(NEURONS))}, or of SpikingJelly (in brackets what "
        f"--neuron-args must give): {names or 'none found'}")
    add("--neuron-args", type=keyword_arguments, metavar="NAME=VALUE,...",
        help="keyword arguments of a neuron of SpikingJelly; it takes --tau, --surrogate and --alpha where it has them")
    add("--tau", type=number(1), metavar="STEPS", help="membrane time constant, in time steps")
    add("--surrogate", choices=SURROGATES, help="surrogate gradient of the spike")
    add("--alpha", type=number(0), metavar="A", help="steepness of the surrogate gradient")


def _add_optimisation_flags(add: Callable) -> None:
    add("--epochs", type=whole(1), metavar="N", help="epochs in all")
    add("--start_epoch", "--start-epoch", type=whole(0), metavar="N",
        help="epoch to count from, for the learning rate; a resumed run knows its own")
    add("-b", "--batch_size", "--batch-size", type=whole(1), metavar="N", help="clips a batch and process")
    add("-lr", "--learning_rate", "--learning-rate", type=number(0), metavar="LR", help="peak learning rate")
    add("--momentum", type=number(0, below=1), metavar="M", help="momentum of SGD")
    add("--weight_decay", "--weight-decay", type=number(0), metavar="W", help="weight decay")
    add("--warmup-epochs", type=whole(0), metavar="N", help="epochs of linear warm-up before the cosine")
    add("--label-smoothing", type=number(0, below=1), metavar="S", help="of the cross-entropy")
    add("--accumulate", type=whole(1), metavar="N", help="batches an optimizer step")
    add("--clip-norm", type=number(0), metavar="NORM", help="largest norm of the gradient; not given: not clipped")
    add("--seed", type=whole(0, below=2**63), metavar="N", help="seed of everything random")


def _add_computing_flags(add: Callable) -> None:
    add("--amp", action=_YES_NO,
        help="mixed precision: bf16 if the hardware has it, fp16 on older GPUs; --no-amp is fp32 (no TF32)")
    add("--sync-bn", action=_YES_NO, help="batch norm statistics over all processes; takes more memory")
    add("--precise-bn", type=whole(0), metavar="N",
        help="before each evaluation, measure batch norm's mean and variance anew on N training clips with the weights "
        "as they are then; 0: the running ones")
    add("--lif-backend", choices=BACKENDS,
        help="code of the spiking layers and of batch norm: fused GPU kernels, plain PyTorch, SpikingJelly; auto: "
        "kernels on a GPU")
    add("--pack-spikes", action=_YES_NO,
        help="keep spikes as one bit each for the backward pass: less memory, some more time")
    add("--deterministic", action=_YES_NO,
        help="the same numbers in every run on the same hardware, at some cost in time")
    add("--compile", action=_YES_NO, help="torch.compile the network")
    add("--cuda-graphs", action=_YES_NO,
        help="replay the training network as CUDA graphs: faster where the host cannot keep up with the GPU (small "
        "batches); takes more memory")
    add("--device", metavar="NAME", help="cuda, cuda:1 or cpu; not given: cuda if there is a GPU")


def _add_run_folder_flags(add: Callable) -> None:
    add("--run-dir", "--output-dir", metavar="FOLDER", help="folder of this run; not given: runs/ and what it trains")
    add("--resume", metavar="auto|PATH", help="continue from a checkpoint; auto: the run folder's newest, if any")
    add("--checkpoint-minutes", type=number(0), metavar="M", help="between checkpoints in mid-epoch; 0: none")
    add("--keep", type=whole(1), metavar="N", help="newest checkpoints kept: last.pt, last-1.pt, ...")
    add("--log-every", type=whole(0), metavar="N",
        help="optimizer steps between lines of steps.jsonl (loss, learning rate, clips/s); 0: none")
    add("--energy", action=_YES_NO,
        help="at the end, count the spikes of the test clips, estimate the energy of a clip, draw firing rates")
    add("--test-only", action=_YES_NO, help="no training: test the checkpoint, write test.json")
    add("--overwrite", action=_YES_NO, help="replace the run that the folder holds")
# fmt: on


def parse(parser: ArgumentParser, defaults: dict) -> argparse.Namespace:
    """The flags over `defaults`, which argparse sees as flags that come first: names, types, ranges and choices of
    both are checked alike. Raises UserError for the first that cannot work."""
    parser.set_defaults(**defaults)  # for --help
    first = [word for name, value in defaults.items() for word in _as_flag(name, value)]
    args = of_this_machine(parser.parse_args(first + sys.argv[1:]))
    network = f"--model {args.model}" if args.model in VIDEO_BACKBONES else f"--branches {args.branches}"
    if is_baseline(args):
        typed = vars(parser.parse_args(sys.argv[1:], argparse.Namespace(**dict.fromkeys(vars(args)))))
        for name in _OF_RESPIKE if args.model in BACKBONES else (*_OF_RESPIKE, *_OF_RESNETS):
            if typed[name] is not None:
                raise UserError(f"--{name.replace('_', '-')}: has no part in the network of {network}; leave it out")
        # What DEFAULTS say of ReSpike has no part either.
        args.stride, args.freeze, args.pack_spikes = 1, None, False  # every frame is a key frame
        if args.model in VIDEO_BACKBONES:
            args.lif_backend, args.sync_bn, args.precise_bn = "auto", False, 0
    _check_together(args)
    return args


def of_this_machine(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with what depends on the machine, if it was not given."""
    if args.workers is None:
        args.workers = min(8, max(1, cpu_count() // local_processes()))
    if args.index_dir is None:
        args.index_dir = str(cache_folder())
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def _as_flag(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name if value else f'no-{name}'}".replace("_", "-")]
    return [] if value is None else [f"--{name.replace('_', '-')}={value}"]


def _check_together(args: argparse.Namespace) -> None:
    """What no flag shows alone."""
    if args.size % SIZE_MULTIPLE:
        nearest = max(1, round(args.size / SIZE_MULTIPLE)) * SIZE_MULTIPLE
        raise UserError(f"--size must be a multiple of {SIZE_MULTIPLE}, got {args.size}; the nearest is {nearest}")
    if args.sampling == "segments" and args.frame_stride != 1:
        raise UserError("--frame-stride: segments cover the whole video; it goes with --sampling window")
    if not is_baseline(args):
        check_stride(args.time, args.stride)
        try:
            parameters = neuron_parameters(args)
        except ValueError as error:
            raise UserError(f"--tau, --surrogate, --alpha: {error}") from error
        # Refused if it is unknown.
        neuron_factory(args.neuron, parameters, args.lif_backend, args.neuron_args, args.stride - 1)
    if args.cuda_graphs and (args.device.startswith("cpu") or args.accumulate > 1 or args.compile):
        raise UserError(
            f"--cuda-graphs needs a GPU, --accumulate 1 and no --compile; got --device {args.device}, "
            f"--accumulate {args.accumulate}{', --compile' if args.compile else ''}"
        )
    if args.clip_norm == 0:
        raise UserError("--clip-norm must be positive, got 0")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch} leaves none of --epochs {args.epochs} to train")
    if args.resume and args.start_epoch:
        raise UserError("--start_epoch: a resumed run continues at its checkpoint's epoch; give one of the two")
    if args.init is not None and not Path(args.init).exists():
        raise UserError(f"--init {args.init}: no such file")
    if args.init is not None and args.resume not in (None, "auto"):
        raise UserError("--init: a resumed run has its weights already; give --init or --resume PATH, not both")
    if args.freeze is not None and args.branches == "snn":
        raise UserError("--freeze ann: --branches snn has no ANN branch")
    if args.freeze is not None and args.branches == "ann" and args.precise_bn:
        raise UserError("--precise-bn: --freeze ann with --branches ann leaves no batch norm to measure")
    if args.test_only and args.precise_bn:
        raise UserError(
            "--precise-bn: --test-only tests the batch norm that the checkpoint holds; evaluate.py --precise-bn "
            "measures it anew"
        )
    if args.test_only and not args.resume:
        raise UserError("--test-only: which weights? Name a checkpoint with --resume PATH, or --resume auto")
    if args.run_dir is None and args.test_only and args.resume != "auto":
        args.run_dir = str(Path(args.resume).parent)


def is_baseline(args: argparse.Namespace) -> bool:
    """Whether the flags name a network to compare ReSpike with (`models.baselines`)."""
    return args.model in VIDEO_BACKBONES or args.branches == "frames"


def neuron_parameters(args: argparse.Namespace) -> LIFParameters:
    return LIFParameters(tau=args.tau, surrogate=args.surrogate, alpha=args.alpha)


def default_run_dir(args: argparse.Namespace, data: str) -> str:
    network = [args.model, args.branches, args.fusion, "downsample" if args.downsample else "full"]
    if is_baseline(args):
        network = [args.model] if args.model in VIDEO_BACKBONES else [args.model, args.branches]
    clip = f"T{args.time}" if is_baseline(args) else f"T{args.time}-stride{args.stride}"
    return f"runs/{data}-{'-'.join(network)}-{clip}-lr{args.learning_rate:g}-seed{args.seed}"


def begin_run(args: argparse.Namespace) -> tuple[Runtime, RunFolder, Checkpoint | None]:
    """The ranks of the run, its folder, and the checkpoint to continue from. Raises UserError."""
    runtime = join_run(args.device, args.amp)
    if args.cuda_graphs and runtime.count > 1:
        raise UserError(f"--cuda-graphs is for one process, this run has {runtime.count}; run without it")
    seed_all(args.seed)
    choose_algorithms(args.deterministic)
    runtime.in_all(runs_on_triton, args.lif_backend, torch.empty(0, device=runtime.device))  # refused if it cannot
    resuming = continues_run(args.resume, args.run_dir, args.test_only)
    run = runtime.from_main(RunFolder, Path(args.run_dir), resuming, args.overwrite)
    print(f"run folder: {run.path}; {device_name(runtime.device)}, {runtime.precision_name}")
    print(f"an optimizer step: {runtime.count} x {args.accumulate} x {args.batch_size} clips (processes, batches, -b)")
    if args.warmup_epochs >= args.epochs and not args.test_only:
        print(
            f"note: --warmup-epochs {args.warmup_epochs} of --epochs {args.epochs}: the learning rate rises to the end "
            "and does not reach -lr"
        )
    checkpoint = runtime.from_main(find_checkpoint, args.resume, run.path, needed=args.test_only)
    return runtime, run, checkpoint


def check_epoch(args: argparse.Namespace, loader: DeviceLoader, runtime: Runtime) -> None:
    """Raise UserError if an epoch cannot be trained on: it has no clip for some rank, or its last batch is a single key
    frame of one pixel after five halvings, which batch norm has nothing to normalise by. Print a note if it has little
    to normalise by."""
    sizes = loader.batches.sizes()  # of the batches, over all ranks
    if args.test_only:
        return
    if not sizes:
        raise UserError(f"{loader.clips} training clips cannot be shared out to {runtime.count} processes")
    key_frames, pixels = args.time // args.stride, (args.size // SIZE_MULTIPLE) ** 2
    smallest = {"-b: the last batch of an epoch": min(sizes)} if args.epochs else {}
    if args.precise_bn:
        loader.batches.set_first(0, args.precise_bn)
        smallest["--precise-bn: its smallest batch"] = min(loader.batches.sizes())
        loader.batches.set_position(0)
    for batch, clips in smallest.items():
        if clips < runtime.count:
            raise UserError(f"{batch} has {clips} clips, which cannot be shared out to {runtime.count} processes")
        if clips // runtime.count * key_frames * pixels == 1:
            raise UserError(
                f"{batch} holds one key frame of {args.size} x {args.size} pixels, on which batch norm cannot be "
                "trained; take another number of clips, more key frames (-T) or a larger --size"
            )
    if not args.epochs:  # evaluate.py trains none
        return
    clips = min(sizes) // (1 if args.sync_bn else runtime.count)
    only_merged = args.snn_bn == "merged" and (args.branches == "snn" or args.freeze == "ann")
    values = clips * key_frames * pixels * (args.stride - 1 if only_merged else 1)
    if values < _FEW_VALUES:
        print(
            f"note: in the smallest batch of an epoch ({clips} clips) batch norm of the last stage has {values} values "
            f"a channel; with fewer than {_FEW_VALUES} the loss may grow without bound: take a larger -b, -T, --size "
            "or a lower -lr"
        )
