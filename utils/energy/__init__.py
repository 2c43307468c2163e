"""Operations of a network for one clip, spikes counted on real clips, and the energy of both."""

from utils.energy.memory import count_memory
from utils.energy.operations import count_operations, spiking_conv_layers
from utils.energy.report import Constants, baselines, energy_report
from utils.energy.spikes import SpikeMeter, assumed_spikes, own_neurons, spike_statistics
from utils.energy.table import format_report

__all__ = [
    "Constants", "SpikeMeter", "assumed_spikes", "baselines", "count_memory", "count_operations", "energy_report",
    "format_report", "own_neurons", "spike_statistics", "spiking_conv_layers",
]  # fmt: skip
