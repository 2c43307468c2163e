"""Sums and counts, kept on the device and read at the end."""

from torch import nn


class FiringRates:
    """Mean firing rate of a ReSpike's LIF layers over every forward inside the `with` block.

    A rate is spikes per neuron and time step, 0 to 1.
    """

    def __init__(self, model: nn.Module):
        self._layers = model.lif_layers()

    def __enter__(self) -> "FiringRates":
        for layers in self._layers.values():
            for layer in layers:
                layer.spike_sum.zero_()
                layer.neuron_steps = 0
                layer.count_spikes = True
        return self

    def __exit__(self, *exc_info) -> None:
        for layers in self._layers.values():
            for layer in layers:
                layer.count_spikes = False

    def per_layer(self) -> list[float]:
        return [layer.spike_sum.item() / layer.neuron_steps for layers in self._layers.values() for layer in layers]

    def per_stage(self) -> dict[str, float]:
        """All spikes of a stage over all its neurons and steps: {"stage1": 0.12, ...}."""
        return {
            stage: sum(layer.spike_sum.item() for layer in layers) / sum(layer.neuron_steps for layer in layers)
            for stage, layers in self._layers.items()
        }
