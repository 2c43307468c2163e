"""Operations of a network for one clip, spikes counted on real clips, and the energy of both.

The energy is arithmetic only: an estimate, not a measurement. The role of a layer decides if it costs multiply-adds
(MACs) or accumulates (ACs), never its values: a layer in which nothing fires is still a spiking layer. Definitions:

- MACs: output positions times weights of each, as every FLOP counter counts them, padding included, without bias.
- Accumulates: a spike costs one for each target that it really has. A spike at (y, x) has fan(y) * fan(x) * C_out
  targets, with 3 positions inside and 2 at a border for stride 1, and 1 or 2 by turns for stride 2.
- What others publish is firing rate times dense MACs. It also pays for targets in the padding, and takes the spikes
  at a border for as many as those inside.
"""

import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import VideoResNet

from models import FramesResNet, Network, ReSpike, attention
from models.attention import GEGLU, CrossAttentionFusion
from models.batch_norm import FusedBatchNorm2d
from models.neurons import LIF
from utils.errors import UserError

NOTE = "arithmetic only, an estimate, not a measurement"
COUNTED_AS_ZERO = {
    "batch norm": "running statistics at inference: folds into the convolution before it, which has a set of weights "
    "for each time step if the steps have statistics of their own (--snn-bn through-time; memory counts the sets)",
    "bias": "one addition for each output of hundreds of multiply-adds",
    "layer and group norm, softmax, GELU and its gate": "no products with weights; at most 0.6 mJ in all",
    "residual additions, pooling, upsampling": "no products with weights; within the same 0.6 mJ",
    "decoding, resizing and subtracting frames": "before the network; the same for every network that reads them",
}
OWN_NEURON = "what its equations multiply more than LIF does is not counted: an update is paid for as one of LIF"
RATE_TIMES_DENSE = "firing rate x dense MACs, as most papers publish it: pays for targets in the padding"
_VIDEO_NETWORKS = ("r3d_18", "mc3_18", "r2plus1d_18")
_WORD = 32  # bits of a value in float32


@dataclass(frozen=True)
class Constants:
    """Energy in picojoule of float32 at 45 nm: M. Horowitz, "Computing's energy problem (and what we can do about
    it)", ISSCC 2014, doi 10.1109/ISSCC.2014.6757323.

    The second line, memory, is a simple model with the same rules for every network: every weight is read once a clip
    from DRAM; for every image and time step, a layer reads its weights and its input from on-chip memory and writes
    its output there once. A value has 32 bits and a spike 1. A neuron reads its current, and reads and writes its
    membrane.
    """

    mac_pj: float = 4.6  # a multiplication, 3.7, and an addition, 0.9
    ac_pj: float = 0.9  # an addition
    sram_64bit_pj: float = 100.0  # an access to a cache of 1 MB (8 KB: 10, 32 KB: 20)
    dram_64bit_pj: float = 1300.0  # the lower end of 1300 to 2600

    @property
    def neuron_step_pj(self) -> float:
        """v/4 + 3x/4 is a MAC (3/4 folds into batch norm); the comparison with the threshold counts as an addition."""
        return self.mac_pj + self.ac_pj

    def memory_mj(self, bits: dict[str, int]) -> dict[str, float]:
        """The result of `count_memory` as energy; the last item is the total."""
        pj_a_bit = {"sram": self.sram_64bit_pj / 64, "dram": self.dram_64bit_pj / 64}
        mj = {name: 1e-9 * count * pj_a_bit[name.rpartition(".")[2]] for name, count in bits.items()}
        return {**mj, "total": sum(mj.values())}


# ---- dense counts: one pass over shapes


@dataclass(frozen=True)
class _Call:
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
        self.calls: list[_Call] = []
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
        call = _Call(kind, module, tuple(x.shape for x in operands if isinstance(x, Tensor)), out.shape)
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


def _calls(model: nn.Module, clip_frames: int, size: int) -> list[_Call]:
    """The calls of a forward pass over one clip, by a copy of the model on device "meta"."""
    model = copy.deepcopy(_plain(model)).to("meta").eval()
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


def _plain(model: nn.Module) -> nn.Module:
    """The network inside the wrapper that torch.compile(model) returns."""
    return getattr(model, "_orig_mod", model)


def count_operations(model: nn.Module, clip_frames: int, size: int) -> dict[str, int]:
    """Dense counts of one clip of `clip_frames` frames of size x size pixels. Needs no data; `model` stays as it is.

    model: a ReSpike, or a network of torchvision for images (which takes the frames one by one) or for videos.

    A name is a part of the network; its number is MACs. Of a ReSpike, these are no MACs at inference:
    snn.spiking_convs.dense (MACs of convolutions if spikes were real numbers), snn.spiking_convs.dense_existing
    (accumulates if every neuron fires at every step), snn.lif_neuron_steps, published_code_adds.* (what the published
    code computes more often), folded.* and other.*. Raises RuntimeError if FlopCounterMode finds a convolution, linear
    layer or attention that is not counted here.
    """
    return _counts(_plain(model), _calls(model, clip_frames, size))


def _counts(model: nn.Module, calls: list[_Call]) -> dict[str, int]:
    if isinstance(model, ReSpike | FramesResNet):
        return _respike_counts(model, calls)
    counts = Counter()
    for call in calls:
        if call.macs:
            first = call.module.removeprefix("body.").partition(".")[0]
            counts["stem" if first == "conv1" else first.replace("layer", "stage")] += call.macs
    return {**counts, "total.macs": sum(counts.values())}


def _respike_counts(model: ReSpike, calls: list[_Call]) -> dict[str, int]:
    parts, other = Counter(), Counter()
    layers = _spiking_conv_layers(model, calls)
    for call in calls:
        in_fusion = call.module.startswith("fusions.")
        parent, _, last = call.module.rpartition(".")
        if call.kind == "attention":
            for product, macs in zip(("qk", "av"), call.attention_products, strict=True):
                parts[_part(f"{call.module}.{product}")] += macs
            other["fusion_softmax_elements"] += call.operands[0][:-1].numel() * call.operands[1][-2]
        elif call.kind == "upsample":
            other["fusion_upsample_macs"] += 4 * call.out.numel()  # bilinear: four neighbours
        elif call.kind == "modulation":  # a multiplication and an addition for each current (`models.film`)
            parts[_part(f"{call.module}.modulation")] += call.out.numel()
        elif call.macs:
            parts[_part(call.module)] += call.macs
        elif call.kind == "batch_norm":
            parts["folded.batch_norm_elements"] += call.out.numel()
        elif call.kind == "norm":
            other["fusion_norm_elements"] += call.out.numel()
        elif call.kind == "pool":
            adds = (call.operands[0].numel() // call.out.numel() - 1) * call.out.numel()
            other["fusion_pool_adds" if in_fusion else "snn_pool_adds"] += adds
        if in_fusion and last in ("to_out", "proj_out") and call.kind == "linear":  # then added to the tokens
            other["fusion_adds"] += call.out.numel()
            if isinstance(model.get_submodule(parent), GEGLU):
                other["fusion_gelu_elements"] += call.operands[0].numel()
                other["fusion_gate_multiplies"] += call.operands[0].numel()
        if call.module.startswith("snn.stages.") and last == "conv2":
            other["snn_residual_adds"] += call.out.numel()

    def total(*prefixes: str, ends: tuple[str, ...] = ("",)) -> int:
        return sum(macs for part, macs in parts.items() if part.startswith(prefixes) and part.endswith(ends))

    folded = parts.pop("folded.batch_norm_elements", 0)
    dense = parts.pop("snn.spiking_convs.dense", 0)
    attended = total("fusion.", ends=("_qk", "_av"))
    published = [i for i, fusion in enumerate(model.fusions, 1) if isinstance(fusion, CrossAttentionFusion)]
    repeated = sum(parts[f"fusion.stage{i}.cross_kv"] for i in published) * (model.stride - 2)  # after the first step
    return {
        **parts,
        "snn.spiking_convs.dense": dense,
        "snn.spiking_convs.dense_existing": sum(layer["dense_existing"] for layer in layers.values()),
        "snn.lif_neuron_steps": sum(layer["neuron_steps"] for layer in layers.values()),
        "total.ann": total("ann."),
        "total.snn_shortcuts": total("snn.shortcut."),
        "total.fusion": total("fusion."),
        "total.fusion_projections": total("fusion.") - attended,
        "total.fusion_attention_products": attended,
        "total.macs": total(""),
        "published_code_adds.cross_kv": repeated,
        "folded.batch_norm_elements": folded,
        **{f"other.{name}": other[name] for name in _OTHER},
    }


_OTHER = (
    "snn_residual_adds", "snn_pool_adds", "fusion_norm_elements", "fusion_softmax_elements", "fusion_gelu_elements",
    "fusion_gate_multiplies", "fusion_adds", "fusion_pool_adds", "fusion_upsample_macs",
)  # fmt: skip
_ATTENTIONS = {"attend_self": "self", "attend_ann": "cross"}
_PROJECTIONS = {"to_q": "q", "to_k": "kv", "to_v": "kv", "to_out": "out"}
_FILM = {"to_gain": "gain", "to_shift": "shift", "modulation": "modulation"}


def _part(module: str) -> str:
    """The part of a ReSpike that a module, or the product "qk" or "av" of an attention, belongs to."""
    match module.split("."):
        case [branch, "stem", *_]:
            return f"{branch}.stem"
        case ["snn", "stages", stage, _, "shortcut_conv"]:
            return f"snn.shortcut.stage{int(stage) + 1}"
        case ["snn", "stages", *_]:
            return "snn.spiking_convs.dense"
        case ["ann", "stages", stage, *_]:
            return f"ann.stage{int(stage) + 1}"
        case ["fusions", stage, "attend_self", "to_q" | "to_k" | "to_v"]:
            return f"fusion.stage{int(stage) + 1}.self_qkv"
        case ["fusions", stage, child, ("to_q" | "to_k" | "to_v" | "to_out" | "qk" | "av") as last]:
            return f"fusion.stage{int(stage) + 1}.{_ATTENTIONS.get(child, child)}_{_PROJECTIONS.get(last, last)}"
        case ["fusions", stage, child, *_]:
            return f"fusion.stage{int(stage) + 1}.{_FILM.get(child, child)}"
    return module


def spiking_conv_layers(model: ReSpike, clip_frames: int, size: int) -> dict[str, dict[str, int]]:
    """The convolutions of spikes for one clip: {"stage1.block1.conv1": {"c_in", "c_out", "size_in", "size_out",
    "stride", "dense", "dense_existing", "neurons", "neuron_steps"}, ...}, with `count_operations`' definitions."""
    return _spiking_conv_layers(_plain(model), _calls(model, clip_frames, size))


def _spiking_conv_layers(model: ReSpike, calls: list[_Call]) -> dict[str, dict[str, int]]:
    names = {f"snn.{path}": (name, conv) for name, (path, conv) in _spiking_convs(model).items()}
    layers = {}
    for call in calls:
        if call.module in names and call.kind == "convolution":
            name, conv = names[call.module]
            images, channels, height, width = call.operands[0]
            targets = sum(_fan_out(height, conv, 0)) * sum(_fan_out(width, conv, 1))
            layers[name] = {
                "c_in": channels, "c_out": conv.out_channels, "size_in": height, "size_out": call.out[2],
                "stride": conv.stride[0], "dense": call.macs,
                "dense_existing": images * channels * targets * conv.out_channels,
                "neurons": channels * height * width, "neuron_steps": call.operands[0].numel(),
            }  # fmt: skip
    return layers


def _spiking_convs(model: ReSpike) -> dict[str, tuple[str, nn.Conv2d]]:
    """{"stage1.block1.conv1": ("stages.0.0.conv1", the convolution), ...}; empty without an SNN."""
    if model.snn is None:
        return {}
    return {
        f"stage{stage + 1}.block{block + 1}.{name}": (f"stages.{stage}.{block}.{name}", getattr(layers, name))
        for stage, blocks in enumerate(model.snn.stages)
        for block, layers in enumerate(blocks)
        for name in ("conv1", "conv2")
    }


@functools.cache
def _reached(length: int, kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    """For each position of a row: how many output positions read it."""
    outputs = (length + 2 * padding - kernel) // stride + 1
    return tuple(sum(0 <= y + padding - stride * out < kernel for out in range(outputs)) for y in range(length))


def _fan_out(length: int, conv: nn.Conv2d, dim: int) -> tuple[int, ...]:
    return _reached(length, conv.kernel_size[dim], conv.stride[dim], conv.padding[dim])


def count_memory(model: nn.Module, clip_frames: int, size: int, spiking: bool = True) -> dict[str, int]:
    """Bits read and written for one clip, by the rules of `Constants`: {"weights.dram", "weights.sram",
    "activations.sram", "spikes.sram", "membranes.sram"}. spiking: if False, a ReSpike with ReLU for its neurons."""
    return _memory(_plain(model), _calls(model, clip_frames, size), spiking)


def _memory(model: nn.Module, calls: list[_Call], spiking: bool = True) -> dict[str, int]:
    spiking_paths = set()
    if isinstance(model, ReSpike) and spiking:
        spiking_paths = {f"snn.{path}" for path, _ in _spiking_convs(model).values()}
    bits = dict.fromkeys(("weights.dram", "weights.sram", "activations.sram", "spikes.sram", "membranes.sram"), 0)
    snn_sets = 1  # of weights, into which batch norm is folded
    if isinstance(model, ReSpike) and model.snn is not None and model.snn.stem.bn.mode == "through-time":
        snn_sets = model.stride - 1
    for call in calls:
        if call.kind not in ("convolution", "linear", "attention"):
            continue
        read = call.operands[0].numel()
        if call.kind == "attention":
            read += call.operands[1].numel() + call.operands[2].numel()
        else:
            sets = snn_sets if call.module.startswith("snn.") else 1
            bits["weights.dram"] += _WORD * call.operands[1].numel() * sets
            bits["weights.sram"] += _WORD * call.operands[1].numel() * call.images
        if call.module in spiking_paths:
            bits["spikes.sram"] += 2 * read  # written by the neurons, read by the convolution
            bits["membranes.sram"] += 3 * _WORD * read
        else:
            bits["activations.sram"] += _WORD * read
        bits["activations.sram"] += _WORD * call.out.numel()
    return bits


# ---- spikes, counted on clips


class SpikeMeter:
    """Counts the spikes of a ReSpike and their accumulates, in every forward pass (evaluation) in the `with` block.

    The counts are integers, the same for every backend of the neurons and every precision that gives the same spikes.
    A pass waits for the GPU only if it is the first of a size. What is wrong with the spikes is reported by `sums`.
    """

    # Columns of `sums`. The last row is the total over all layers.
    COLUMNS = ("clips", "accumulates", "squared accumulates", "spikes", "neuron steps", "dense MACs")

    def __init__(self, model: nn.Module):
        self._model = _plain(model)
        self._convs = {name: conv for name, (_, conv) in _spiking_convs(self._model).items()}
        self.layers = list(self._convs)
        self.clips = 0
        self._sizes = {name: [0, 0] for name in self.layers}  # neuron steps and dense MACs
        device = next(self._model.parameters()).device
        self._sums = torch.zeros(len(self.layers) + 1, 3, dtype=torch.float64, device=device)
        self._graded = torch.zeros(len(self.layers), dtype=torch.bool, device=device)  # not 0 or 1
        self._fans: dict[tuple, Tensor] = {}
        self._seen: dict[str, tuple[Tensor, ...]] = {}
        self._handles = []

    def __enter__(self) -> "SpikeMeter":
        # A graph that was compiled before this block knows no hooks. It would count nothing and report no error:
        # PyTorch does not compile anew for hooks.
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._handles = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, conv in self._convs.items():
            self._handles.append(conv.register_forward_hook(functools.partial(self._count, name)))
        self._handles.append(self._model.register_forward_hook(self._end))
        return self

    def __exit__(self, *exc_info) -> None:
        for handle in self._handles:
            handle.remove()
        self._eager.__exit__(*exc_info)

    def _begin(self, model: nn.Module, inputs: tuple, named: dict) -> None:
        self._batch = len(inputs[0] if inputs else named["key"])
        self._seen = {}

    @torch.no_grad()
    def _count(self, name: str, conv: nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> None:
        spikes = inputs[0]  # [S*B*K, C, H, W]
        graded = ((spikes != 0) & (spikes != 1)).any()
        # Whole numbers up to C: exact in float32, whatever the type of the spikes.
        spikes_at = spikes.sum(1, dtype=torch.float32).double()  # [S*B*K, H, W]
        steps = self._model.stride - 1
        # [S*B*K, H, W] -> [B]
        accumulates = (spikes_at * self._fan(name, conv, spikes)).view(steps, self._batch, -1).sum((0, 2))
        self._seen[name] = graded, accumulates * (conv.out_channels // conv.groups), spikes_at.sum()
        self._sizes[name][0] += spikes.numel()
        self._sizes[name][1] += out.numel() * conv.weight[0].numel()

    def _fan(self, name: str, conv: nn.Conv2d, spikes: Tensor) -> Tensor:
        """[H, W]: how many positions of the output read each position of the input. Kept, because a copy of numbers to
        a GPU waits for it."""
        size = spikes.shape[2:]
        if (name, size) not in self._fans:
            along = (_fan_out(length, conv, dim) for dim, length in enumerate(size))
            fan = torch.outer(*(torch.tensor(numbers, dtype=torch.float64) for numbers in along))
            self._fans[name, size] = fan.to(spikes.device)
        return self._fans[name, size]

    @torch.no_grad()
    def _end(self, model: nn.Module, inputs: tuple, logits: Tensor) -> None:
        missing = [name for name in self.layers if name not in self._seen]
        if missing:
            raise RuntimeError(f"{missing[0]}: its spikes were not seen; count them under torch.no_grad()")
        self.clips += self._batch
        if not self.layers:
            return
        seen = zip(*(self._seen[name] for name in self.layers), strict=True)
        graded, accumulates, spikes = (torch.stack(values) for values in seen)
        self._graded = self._graded | graded
        accumulates = torch.cat([accumulates, accumulates.sum(0, keepdim=True)])  # [layers + 1, B]
        spikes = torch.cat([spikes, spikes.sum(0, keepdim=True)])
        self._sums = self._sums + torch.stack([accumulates.sum(1), accumulates.square().sum(1), spikes], dim=1)

    def sums(self) -> Tensor:
        """float64 [layers + 1, COLUMNS], on the device of the model: may be added up over ranks (`Runtime.sum`), then
        read by `spike_statistics`.

        Raises RuntimeError if a layer that takes spikes was given other values than 0 and 1; UserError if these are the
        spikes of a neuron that a user has defined.
        """
        graded = [name for name, found in zip(self.layers, self._graded.tolist(), strict=True) if found]
        if graded:
            self._refuse(graded[0])
        sizes = [*self._sizes.values(), [sum(column) for column in zip([0, 0], *self._sizes.values(), strict=True)]]
        sizes = torch.tensor(sizes, dtype=torch.float64, device=self._sums.device)
        return torch.cat([torch.full_like(sizes[:, :1], self.clips), self._sums, sizes], dim=1)

    def _refuse(self, name: str) -> None:
        neurons = own_neurons(self._model)
        if not neurons:
            raise RuntimeError(f"{name}: expected spikes of 0 and 1, found other values")
        own = ", ".join(neurons)
        raise UserError(f"energy is counted for spikes of 0 and 1; neuron {own} gives others at {name}")


def own_neurons(model: nn.Module) -> list[str]:
    """Names of the neurons of a ReSpike that are not `LIF` itself: their equations are not known here."""
    layers = [layer for layers in _plain(model).lif_layers().values() for layer in layers]
    return sorted({layer.name for layer in layers if type(layer) is not LIF})


def spike_statistics(sums: Tensor, layers: Sequence[str]) -> dict:
    """What `SpikeMeter.sums()` holds, for `energy_report`: {"clips", "mean", "std", "layers"}.

    mean, std: accumulates a clip, over clips. layers: name -> {"mean", "std", "rate", "dense"} with spikes a neuron
    and step, and dense MACs a clip. layers: `SpikeMeter.layers`.
    """
    rows = {}
    for name, (clips, total, squares, spikes, steps, dense) in zip([*layers, "total"], sums.tolist(), strict=True):
        clips, mean = clips or math.nan, total / (clips or math.nan)
        std = math.sqrt(max(0.0, squares / clips - mean**2)) if clips == clips else math.nan
        rows[name] = {"mean": mean, "std": std, "rate": spikes / (steps or math.nan), "dense": dense / clips}
    total = rows.pop("total")
    return {"clips": int(sums[-1, 0]), "mean": total["mean"], "std": total["std"], "layers": rows}


def assumed_spikes(model: ReSpike, clip_frames: int, size: int, rates: float | dict[str, float]) -> dict:
    """As `spike_statistics`, of neurons that fire evenly at given rates instead of counted spikes.

    rates: one for all layers, or layer -> rate. Raises UserError if a layer of the network has no rate.
    """
    layers = {}
    for name, layer in spiking_conv_layers(model, clip_frames, size).items():
        if not isinstance(rates, float) and name not in rates:
            raise UserError(f"expected a firing rate of every layer, found none of {name}")
        rate = rates if isinstance(rates, float) else rates[name]
        layers[name] = {"mean": rate * layer["dense_existing"], "std": 0.0, "rate": rate, "dense": layer["dense"]}
    return {"clips": 0, "mean": sum(layer["mean"] for layer in layers.values()), "std": 0.0, "layers": layers}


# ---- energy


def energy_report(
    counts: dict[str, int],
    spikes: dict,
    constants: Constants = Constants(),
    memory: dict[str, int] | None = None,
    others: dict[str, dict] | None = None,
    neurons: Sequence[str] = (),
) -> dict:
    """Energy of a ReSpike for one clip, in mJ, for evaluation.json.

    counts: `count_operations` of it. spikes: `spike_statistics`. memory: `count_memory` of it. others: `baselines`.
    neurons: `own_neurons` of it. They are paid for as LIF, and named in the report.
    """
    parts: dict[str, dict] = {}
    for part, count in counts.items():
        if row := _row(part):
            kind = {"neuron_updates": "mac+ac"}.get(row, "mac")
            parts.setdefault(row, {"operations": 0, "kind": kind, "mj": 0.0})["operations"] += count
    if spikes["layers"]:
        parts["spiking_convs"] = {"operations": spikes["mean"], "kind": "ac", "mj": 0.0}
    parts = {row: parts[row] for row in sorted(parts, key=_place)}
    pj = {"mac": constants.mac_pj, "ac": constants.ac_pj, "mac+ac": constants.neuron_step_pj}
    for part in parts.values():
        part["mj"] = 1e-9 * part["operations"] * pj[part["kind"]]
    total = sum(part["mj"] for part in parts.values())
    spiking_mj = parts["spiking_convs"]["mj"] if "spiking_convs" in parts else 0.0
    layers = spikes["layers"]
    dense = counts.get("snn.spiking_convs.dense_existing", 0)
    report = {
        "note": NOTE,
        "constants": asdict(constants),
        "parts": parts,
        "spikes": {
            "clips": spikes["clips"], "accumulates_mean": spikes["mean"], "accumulates_std": spikes["std"],
            "accumulates": {name: layer["mean"] for name, layer in layers.items()},
            "firing_rates": {name: layer["rate"] for name, layer in layers.items()},
            "mj": spiking_mj,
            "rate_x_dense_mj": 1e-9 * constants.ac_pj * sum(row["rate"] * row["dense"] for row in layers.values()),
            "rate_x_dense_is": RATE_TIMES_DENSE,
        },
        "counted_as_zero": COUNTED_AS_ZERO | {f"neuron {name}": OWN_NEURON for name in neurons},
        "total_mj": total,
        "total_mj_std": 1e-9 * constants.ac_pj * spikes["std"],
    }  # fmt: skip
    if memory is not None:
        report["memory"] = {
            "note": "estimate: see utils.energy.Constants", "bits": memory, "mj": constants.memory_mj(memory)
        }  # fmt: skip
    if others is not None:
        report["baselines"] = others
        rest, all_fire = total - spiking_mj, 1e-9 * constants.ac_pj * dense
        rates = {name: (other["mj"] - rest) / (all_fire or math.nan) for name, other in others.items()}
        report["break_even_rate"] = {name: rate if 0 <= rate <= 1 else None for name, rate in rates.items()}
    return report


_ROWS = ("resnet", "snn_stem", "spiking_convs", "shortcuts", "neuron_updates", "fusion", "head")


def _place(row: str) -> tuple:
    first = row.partition(".")[0]
    return (_ROWS.index(first) if first in _ROWS else len(_ROWS), row)


def _row(part: str) -> str | None:
    """The row of the report for a part of `count_operations`; None if the part is not paid for, or by its spikes."""
    match part.split("."):
        case ["total" | "folded" | "other" | "published_code_adds", *_] | ["snn", "spiking_convs", _]:
            return None
        case ["ann", _]:
            return "resnet"
        case ["snn", "stem"]:
            return "snn_stem"
        case ["snn", "shortcut", _]:
            return "shortcuts"
        case ["snn", "lif_neuron_steps"]:
            return "neuron_updates"
        case ["fusion", stage, name]:
            if name in _FILM.values():
                return part
            if name.endswith(("_qk", "_av")):
                return f"fusion.{stage}.attention"
            return f"fusion.{stage}.{'feed_forward' if name == 'feed_forward' else 'projections'}"
    return part


def baselines(
    model: ReSpike, clip_frames: int, size: int, num_classes: int, constants: Constants = Constants()
) -> dict[str, dict]:
    """Other networks on the same clip, counted alike: name -> {"macs", "mj", "memory_mj"}.

    ResNets take each frame alone. respike_relu is `model` with ReLU for its neurons: every convolution of spikes is
    then a dense one. Names of video networks end in their size in pixels.
    """

    def entry(macs: int, memory: dict[str, int]) -> dict:
        return {"macs": macs, "mj": 1e-9 * constants.mac_pj * macs, "memory_mj": constants.memory_mj(memory)["total"]}

    model = _plain(model)
    runs = {
        f"{name}_{which}_frames": (name, frames, size)
        for name in ("resnet18", "resnet50")
        for which, frames in (("all", clip_frames), ("key", clip_frames // model.stride))
    } | {f"{name}_{pixels}": (name, clip_frames, pixels) for name in _VIDEO_NETWORKS for pixels in (112, 224)}
    entries = {}
    for key, (name, *clip) in runs.items():
        with torch.device("meta"):
            network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        calls = _calls(network, *clip)
        entries[key] = entry(_counts(network, calls)["total.macs"], _memory(network, calls))
    if model.snn is not None:
        calls = _calls(model, clip_frames, size)
        counts = _counts(model, calls)
        relu_macs = counts["total.macs"] + counts["snn.spiking_convs.dense"]
        entries["respike_relu"] = entry(relu_macs, _memory(model, calls, spiking=False))
    return entries


def format_report(report: dict) -> str:
    """The report of `energy_report` as plain text in aligned columns."""
    total, spikes = report["total_mj"], report["spikes"]
    rows = [("part", "operations", "kind", "mJ", "share")]
    for row, part in report["parts"].items():
        share = f"{100 * part['mj'] / total:.1f} %"
        rows.append((row, f"{part['operations']:,.0f}", part["kind"].upper(), f"{part['mj']:.3f}", share))
    rows.append(("total", "", "", f"{total:.3f}", "100.0 %"))
    lines = [f"Energy of one clip: {report['note']}", *_aligned(rows)]
    lines.append(f"standard deviation over {spikes['clips']} clips: {report['total_mj_std']:.3f} mJ")
    lines.append(f"spikes as others publish them (firing rate x dense MACs): {spikes['rate_x_dense_mj']:.3f} mJ")
    if "memory" in report:
        mj = report["memory"]["mj"]
        lines.append(f"memory, an estimate, not in the total: {mj['total']:.3f} mJ ({_listed(mj)})")
    if "baselines" in report:
        rows = [("baseline", "MACs", "mJ", "x ReSpike", "memory mJ", "breaks even at a spike rate of")]
        for name, other in report["baselines"].items():
            rate = report["break_even_rate"][name]
            always = "ReSpike always costs " + ("less" if other["mj"] > total else "more")
            even = always if rate is None else f"{100 * rate:.1f} %"
            mj = (f"{other['mj']:.3f}", f"{other['mj'] / total:.2f}", f"{other['memory_mj']:.3f}")
            rows.append((name, f"{other['macs']:,}", *mj, even))
        lines += ["", *_aligned(rows)]
    lines += ["", "counted as zero:", *(f"  {name}: {reason}" for name, reason in report["counted_as_zero"].items())]
    return "\n".join(lines)


def _listed(mj: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in mj.items() if name != "total")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
