"""Every call of a counted function in one forward pass, by the shapes of its tensors: no data, no computing."""

import copy
import functools
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import VideoResNet

from models import Network, attention
from models.batch_norm import FusedBatchNorm2d
from models.neurons import LIF


@dataclass(frozen=True)
class Call:
    """A call of one of the functions that are counted, by the network's module that makes it."""

    kind: str
    module: str
    operands: tuple[torch.Size, ...]
    out: torch.Size

    @property
    def macs(self) -> int:
        if self.kind in ("convolution", "linear"):
            return self.out.numel() * self.operands[1][1:].numel()
        if self.kind == "attention":
            return sum(self.attention_products)
        if self.kind == "upsample":  # a product with a constant matrix (`models.attention.upsample_tokens`)
            return self.out.numel() * self.operands[0][1]
        return 0

    @property
    def attention_products(self) -> tuple[int, int]:
        """(MACs of q k^T, MACs of the weights with v)"""
        queries, keys = self.operands[0][:-1].numel(), self.operands[1][-2]
        return queries * keys * self.operands[0][-1], queries * keys * self.operands[2][-1]

    @property
    def images(self) -> int:
        """Images, or frames of a 3-D convolution, that the weights are applied to."""
        return self.operands[0][0] * (self.out[2] if len(self.out) == 5 else 1)


_KINDS = {
    F.conv1d: "convolution", F.conv2d: "convolution", F.conv3d: "convolution", F.linear: "linear",
    F.scaled_dot_product_attention: "attention", F.batch_norm: "batch_norm", F.layer_norm: "norm",
    F.group_norm: "norm", F.avg_pool2d: "pool", torch.addcmul: "modulation",
}  # fmt: skip


class _Calls(TorchFunctionMode):
    """Lists the calls of the functions in _KINDS, and adds up their MACs for each module, as `flops` does."""

    def __init__(self, flops: FlopCounterMode):
        super().__init__()
        self._flops = flops
        self.calls: list[Call] = []
        self.macs = Counter()

    def __torch_function__(self, function, types, operands=(), named=None):
        out = function(*operands, **(named or {}))
        if function in _KINDS:
            self.add(_KINDS[function], operands, out)
        return out

    def add(self, kind: str, operands: tuple, out: Tensor) -> None:
        running = self._flops.mod_tracker.parents - {"Global"}
        module = max(running, key=len).partition(".")[2]  # "ReSpike.head" -> "head"
        if kind == "attention":  # the module whose projection came before: not every way to attend calls a module
            before = next((call.module for call in reversed(self.calls) if call.kind == "linear"), module)
            module = before.rpartition(".")[0]
        call = Call(kind, module, tuple(x.shape for x in operands if isinstance(x, Tensor)), out.shape)
        self.calls.append(call)
        for name in running:
            self.macs[name] += call.macs

    def check(self) -> None:
        """Raise RuntimeError if FlopCounterMode counts another number of MACs in any module."""
        theirs = {name: sum(flops.values()) // 2 for name, flops in self._flops.get_flop_counts().items()}
        differ = sorted(name for name in theirs if name != "Global" and theirs[name] != self.macs[name])
        innermost = [name for name in differ if not any(other.startswith(f"{name}.") for other in differ)]
        if innermost:
            found = "; ".join(f"{name}: {self.macs[name]} MACs of {theirs[name]}" for name in innermost)
            raise RuntimeError(f"products of the network are left uncounted, by FlopCounterMode: {found}")


def calls_of(model: nn.Module, clip_frames: int, size: int) -> list[Call]:
    """The calls of a forward pass over one clip, by a copy of the model on device "meta"."""
    model = copy.deepcopy(plain(model)).to("meta").eval()
    for module in model.modules():
        if isinstance(module, LIF | FusedBatchNorm2d):
            module.backend = "reference"  # kernels do not run on shapes alone
    dtype = next(model.parameters()).dtype
    frames = torch.empty(clip_frames, 3, size, size, dtype=dtype, device="meta")
    if isinstance(model, Network):
        segments = frames.view(1, -1, model.stride, *frames.shape[1:])  # [1, K, stride, 3, H, W]
        inputs = (segments[:, :, 0], segments[:, :, 1:])
    elif isinstance(model, VideoResNet):
        inputs = (frames.transpose(0, 1)[None],)  # [1, 3, T, H, W]
    else:
        inputs = (frames,)
    flops = FlopCounterMode(display=False)
    counter = _Calls(flops)
    upsample = attention.upsample_tokens

    @functools.wraps(upsample)
    def upsampled(tokens: Tensor, *sizes: int, **named_sizes: int) -> Tensor:
        out = upsample(tokens, *sizes, **named_sizes)
        counter.add("upsample", (tokens,), out)
        return out

    # Attention runs as plain products, which FlopCounterMode counts in every version of PyTorch.
    with (
        torch.no_grad(), torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH), mock.patch.object(attention, "upsample_tokens", upsampled), flops, counter,
    ):  # fmt: skip
        model(*inputs)
    counter.check()
    return counter.calls


def plain(model: nn.Module) -> nn.Module:
    """The network inside the wrapper that torch.compile(model) returns."""
    return getattr(model, "_orig_mod", model)
