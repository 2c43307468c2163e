"""Memory by hand."""

import torch
from torch import nn

from models import ReSpike
from utils.energy.memory import count_memory
from utils.energy.operations import count_operations
from utils.energy.report import Constants


def test_statistics_of_each_step_fold_into_weights_of_each_step():
    """Batch norm costs no operation; the SNN's convolutions are read once for each of the 3 steps."""
    counted = []
    for mode in ("per-step", "through-time"):
        with torch.device("meta"):
            model = ReSpike(stride=4, snn_batch_norm=mode)
        convs = sum(w.numel() for name, w in model.snn.named_parameters() if "conv" in name and name.endswith("weight"))
        counted.append((count_operations(model, 8, 64), count_memory(model, 8, 64)))
    (operations, memory), (each_operations, each_memory) = counted
    assert each_operations == operations
    assert each_memory == memory | {"weights.dram": memory["weights.dram"] + 2 * 32 * convs}


def test_memory_by_hand():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    weights, frames = (8 * 27, 5 * 2048), 2
    assert count_memory(layers, frames, 32) == {
        "weights.dram": 32 * sum(weights),
        "weights.sram": 32 * frames * sum(weights),
        "activations.sram": 32 * frames * (3 * 32 * 32 + 2 * 2048 + 5),
        "spikes.sram": 0,
        "membranes.sram": 0,
    }
    model = ReSpike(num_classes=4, branches="snn", stride=3)
    spiking, relu = count_memory(model, 6, 32), count_memory(model, 6, 32, spiking=False)
    steps = count_operations(model, 6, 32)["snn.lif_neuron_steps"]
    assert spiking["spikes.sram"] == 2 * steps and spiking["membranes.sram"] == 3 * 32 * steps
    assert relu["activations.sram"] - spiking["activations.sram"] == 32 * steps
    assert relu["spikes.sram"] == relu["membranes.sram"] == 0
    mj = Constants(sram_64bit_pj=64.0, dram_64bit_pj=640.0).memory_mj({"weights.dram": 10**9, "weights.sram": 10**9})
    assert mj == {"weights.dram": 10.0, "weights.sram": 1.0, "total": 11.0}
