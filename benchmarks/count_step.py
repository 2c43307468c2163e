"""What a training step moves and computes on a GPU, counted without one, and what the host does meanwhile.

    python -m benchmarks.count_step --model resnet50 -b 32

Bytes: every operator's operands and results, each once, for tensors without memory that PyTorch takes for CUDA ones;
bfloat16 autocast, forward and backward (the optimizer is not counted). A kernel that reads its input twice is counted
as if it read it once: the true figure is higher. Operations: those of convolutions, matrix products and attention, as
torch.utils.flop_counter counts them. Floors: the bytes at --bandwidth, the operations at --rate.

Host time: processor time of a step on the CPU, on one thread, of a network with as many layers but few channels, on
frames of 32 pixels and without our kernels. That is Python, dispatch and autograd, and some computing that cannot be
taken off. A GPU adds each launch's part of Triton and of the driver, and autocast's casts of the weights.
"""

import argparse
import statistics
import time
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from dataset.residual import PADDED_CHANNELS
from models import ReSpike, attention, batch_norm, neurons, resnet, spiking_resnet
from models.kernels import geglu
from tests.helpers.fake_gpu import Calls, backward, channels_last, fake_gpu, launch_nothing

THINNER = 8  # times: the ANN branch of the network whose host time is taken
THIN_CHANNELS = (32, 32, 32, 32)  # of its SNN branch: a head of attention each


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="clips")
    parser.add_argument("-T", "--time", type=int, default=16, help="frames a clip")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--downsample", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second; an H200's")
    parser.add_argument(
        "--rate", type=float, default=790e12, help="operations a second; an H200's, bfloat16, sustained"
    )
    parser.add_argument(
        "--capability", default="9.0", choices=["8.0", "9.0"], help="of the GPU; from 9.0 on attention is cuDNN's"
    )
    parser.add_argument("--runs", type=int, default=25, help="counted runs of the host's part; two more warm up")
    parser.add_argument("--operators", action="store_true", help="list the bytes of each operator")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    calls, operations = count(args)
    moved = sum(call.bytes for call in calls)
    floors = moved / args.bandwidth, operations / args.rate
    host = statistics.median(host_seconds(args))
    print(
        f"{args.model}, {args.batch_size} clips: {moved / 1e9:.1f} GB, {operations / 1e12:.2f} TFLOP, "
        f"{len(calls)} operators; floors {1e3 * floors[0]:.1f} ms (memory), {1e3 * floors[1]:.1f} ms (products); "
        f"host {1e3 * host:.1f} ms"
    )
    if args.operators:
        by_name = defaultdict(lambda: [0, 0])
        for call in calls:
            by_name[call.name][0] += call.bytes
            by_name[call.name][1] += 1
        for name, (total, number) in sorted(by_name.items(), key=lambda item: -item[1][0]):
            print(f"{total / 1e9:8.2f} GB {number:5d} x {name}")


def inputs(args: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple:
    """(key frames, residual frames, labels), laid out as `dataset.residual.key_residual_split` does."""
    keys, steps = args.time // args.stride, args.stride - 1
    frame = (args.size, args.size, PADDED_CHANNELS if device == "cuda" else 3)
    key = torch.empty(args.batch_size, keys, *frame, dtype=dtype, device=device).permute(0, 1, 4, 2, 3)
    residual = torch.empty(steps, args.batch_size, keys, *frame, dtype=dtype, device=device).permute(1, 2, 0, 5, 3, 4)
    return key, residual, torch.zeros(args.batch_size, dtype=torch.int64, device=device)


def build(args: argparse.Namespace) -> ReSpike:
    return ReSpike(args.model, num_classes=400, stride=args.stride, downsample=args.downsample).train()


def count(args: argparse.Namespace) -> tuple[list, int]:
    """(every operator of a step, operations)"""
    capability = tuple(int(number) for number in args.capability.split("."))
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch, torch.bfloat16, capability):
        model = channels_last(build(args))
        key, residual, labels = inputs(args, "cuda", torch.bfloat16)
        with Calls() as calls, FlopCounterMode(display=False) as counter:
            backward(F.cross_entropy(model(key, residual).float(), labels))
    return calls.calls, counter.get_total_flops()


def host_seconds(args: argparse.Namespace) -> list[float]:
    """Of a step on the CPU in float32, two key frames of 32 pixels, our kernels' launches left out."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (batch_norm, neurons):
            patch.setattr(module, "runs_on_triton", lambda backend, x: True)
        patch.setattr(attention, "geglu", geglu._geglu)
        launch_nothing(patch)
        make_thin(patch)
        args = argparse.Namespace(**{**vars(args), "batch_size": 1, "time": 2 * args.stride, "size": 32})
        model = build(args).to(memory_format=torch.channels_last)
        key, residual, labels = inputs(args, "cpu", torch.float32)
        patch.setattr(
            torch.backends.mkldnn, "enabled", False
        )  # it prepares each convolution for as long as it computes
        seconds = []
        for _ in range(args.runs + 2):
            start = time.process_time()
            F.cross_entropy(model(key, residual), labels).backward()
            seconds.append(time.process_time() - start)
            model.zero_grad(set_to_none=True)
    return seconds[2:]


def make_thin(patch: pytest.MonkeyPatch) -> None:
    """From here on networks are built with few channels."""
    make_layer, init = torchvision.models.ResNet._make_layer, resnet.ResNetStages.__init__

    def thin_layer(self, block, planes, *arguments, **named):
        return make_layer(self, block, planes // THINNER, *arguments, **named)

    def thin_stages(self, *arguments, **named):
        init(self, *arguments, **named)
        self.channels = [channels // THINNER for channels in self.channels]

    patch.setattr(torchvision.models.ResNet, "_make_layer", thin_layer)
    patch.setattr(resnet.ResNetStages, "__init__", thin_stages)
    patch.setattr(spiking_resnet, "CHANNELS", THIN_CHANNELS)


if __name__ == "__main__":
    main()
