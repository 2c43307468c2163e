"""Dense counts: the operations of a network for one clip, by the shapes of its tensors.

- MACs: output positions times weights of each, as every FLOP counter counts them, padding included, without bias.
- Accumulates: a spike costs one for each target that it really has. A spike at (y, x) has fan(y) * fan(x) * C_out
  targets, with 3 positions inside and 2 at a border for stride 1, and 1 or 2 by turns for stride 2.
"""

from collections import Counter

from torch import nn

from models import FramesResNet, ReSpike
from models.attention import GEGLU, CrossAttentionFusion
from utils.energy.calls import Call, calls_of, plain


def count_operations(model: nn.Module, clip_frames: int, size: int) -> dict[str, int]:
    """Dense counts of one clip of `clip_frames` frames of size x size pixels. Needs no data; `model` stays as it is.

    model: a ReSpike, or a network of torchvision for images (which takes the frames one by one) or for videos.

    A name is a part of the network; its number is MACs. Of a ReSpike, these are no MACs at inference:
    snn.spiking_convs.dense (MACs of convolutions if spikes were real numbers), snn.spiking_convs.dense_existing
    (accumulates if every neuron fires at every step), snn.lif_neuron_steps, published_code_adds.* (what the published
    code computes more often), folded.* and other.*. Raises RuntimeError if FlopCounterMode finds a convolution, linear
    layer or attention that is not counted here.
    """
    return operations_of(plain(model), calls_of(model, clip_frames, size))


def operations_of(model: nn.Module, calls: list[Call]) -> dict[str, int]:
    """`count_operations` of a network that was not compiled, whose calls are known."""
    if isinstance(model, ReSpike | FramesResNet):
        return _respike_operations(model, calls)
    counts = Counter()
    for call in calls:
        if call.macs:
            first = call.module.removeprefix("body.").partition(".")[0]
            counts["stem" if first == "conv1" else first.replace("layer", "stage")] += call.macs
    return {**counts, "total.macs": sum(counts.values())}


def _respike_operations(model: ReSpike, calls: list[Call]) -> dict[str, int]:
    parts, other = Counter(), Counter()
    layers = _layers_of(model, calls)
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
            other["batch_norm_elements"] += call.out.numel()
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
        "folded.batch_norm_elements": other["batch_norm_elements"],
        **{f"other.{name}": other[name] for name in _OTHER},
    }


_OTHER = (
    "snn_residual_adds", "snn_pool_adds", "fusion_norm_elements", "fusion_softmax_elements", "fusion_gelu_elements",
    "fusion_gate_multiplies", "fusion_adds", "fusion_pool_adds", "fusion_upsample_macs",
)  # fmt: skip
_ATTENTIONS = {"attend_self": "self", "attend_ann": "cross"}
_PROJECTIONS = {"to_q": "q", "to_k": "kv", "to_v": "kv", "to_out": "out"}
FILM = {"to_gain": "gain", "to_shift": "shift", "modulation": "modulation"}


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
            return f"fusion.stage{int(stage) + 1}.{FILM.get(child, child)}"
    return module


def spiking_conv_layers(model: ReSpike, clip_frames: int, size: int) -> dict[str, dict[str, int]]:
    """The convolutions of spikes for one clip: {"stage1.block1.conv1": {"c_in", "c_out", "size_in", "size_out",
    "stride", "dense", "dense_existing", "neurons", "neuron_steps"}, ...}, with `count_operations`' definitions."""
    return _layers_of(plain(model), calls_of(model, clip_frames, size))


def _layers_of(model: ReSpike, calls: list[Call]) -> dict[str, dict[str, int]]:
    names = {path: (name, conv) for name, (path, conv) in spiking_convs(model).items()}
    layers = {}
    for call in calls:
        if call.module in names and call.kind == "convolution":
            name, conv = names[call.module]
            images, channels, height, width = call.operands[0]
            targets = sum(fan_out(height, conv, 0)) * sum(fan_out(width, conv, 1))
            layers[name] = {
                "c_in": channels, "c_out": conv.out_channels, "size_in": height, "size_out": call.out[2],
                "stride": conv.stride[0], "dense": call.macs,
                "dense_existing": images * channels * targets * conv.out_channels,
                "neurons": channels * height * width, "neuron_steps": call.operands[0].numel(),
            }  # fmt: skip
    return layers


def spiking_convs(model: nn.Module) -> dict[str, tuple[str, nn.Conv2d]]:
    """{"stage1.block1.conv1": ("snn.stages.0.0.conv1", the convolution), ...}; empty without an SNN."""
    if getattr(model, "snn", None) is None:
        return {}
    return {
        f"stage{stage + 1}.block{block + 1}.{name}": (f"snn.stages.{stage}.{block}.{name}", getattr(layers, name))
        for stage, blocks in enumerate(model.snn.stages)
        for block, layers in enumerate(blocks)
        for name in ("conv1", "conv2")
    }


def fan_out(length: int, conv: nn.Conv2d, dim: int) -> list[int]:
    """For each position along a dimension of `length` of an image: how many output positions read it."""
    kernel, stride, padding = conv.kernel_size[dim], conv.stride[dim], conv.padding[dim]
    outputs = range((length + 2 * padding - kernel) // stride + 1)
    return [sum(0 <= y + padding - stride * out < kernel for out in outputs) for y in range(length)]
