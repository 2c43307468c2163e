"""Bits that a network reads and writes for one clip."""

from torch import nn

from utils.energy.calls import Call, calls_of, plain
from utils.energy.operations import spiking_convs

_WORD = 32  # bits of a value in float32


def count_memory(model: nn.Module, clip_frames: int, size: int, spiking: bool = True) -> dict[str, int]:
    """Bits read and written for one clip, by the rules of `utils.energy.Constants`: {"weights.dram",
    "weights.sram", "activations.sram", "spikes.sram", "membranes.sram"}.

    spiking: if False, a ReSpike with ReLU for its neurons.
    """
    return memory_of(plain(model), calls_of(model, clip_frames, size), spiking)


def memory_of(model: nn.Module, calls: list[Call], spiking: bool = True) -> dict[str, int]:
    """`count_memory` of a network that was not compiled, whose calls are known."""
    convs = spiking_convs(model)
    spiking_paths = {path for path, _ in convs.values()} if spiking else set()
    bits = dict.fromkeys(("weights.dram", "weights.sram", "activations.sram", "spikes.sram", "membranes.sram"), 0)
    # Sets of weights, into which batch norm is folded.
    snn_sets = model.stride - 1 if convs and model.snn.stem.bn.mode == "through-time" else 1
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
