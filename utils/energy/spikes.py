"""Spikes of a network and their accumulates: counted on clips, or of neurons that fire at given rates."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models import ReSpike
from models.neurons import LIF
from utils.energy.calls import plain
from utils.energy.operations import fan_out, spiking_conv_layers, spiking_convs
from utils.errors import UserError


class SpikeMeter:
    """Counts the spikes of a ReSpike and their accumulates, in every forward pass (evaluation) in the `with` block.

    The counts are integers, the same for every backend of the neurons and every precision that gives the same spikes.
    A pass waits for the GPU only if it is the first of a size. What is wrong with the spikes is reported by `sums`.
    """

    # Columns of `sums`. The last row is the total over all layers.
    COLUMNS = ("clips", "accumulates", "squared accumulates", "spikes", "neuron steps", "dense MACs")

    def __init__(self, model: nn.Module):
        self._model = plain(model)
        self._convs = {name: conv for name, (_, conv) in spiking_convs(self._model).items()}
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
            along = (fan_out(length, conv, dim) for dim, length in enumerate(size))
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
            if own := ", ".join(own_neurons(self._model)):
                raise UserError(f"energy is counted for spikes of 0 and 1; neuron {own} gives others at {graded[0]}")
            raise RuntimeError(f"{graded[0]}: expected spikes of 0 and 1, found other values")
        sizes = torch.tensor([*self._sizes.values()], dtype=torch.float64, device=self._sums.device).view(-1, 2)
        sizes = torch.cat([sizes, sizes.sum(0, keepdim=True)])  # [layers + 1, 2]
        return torch.cat([torch.full_like(sizes[:, :1], self.clips), self._sums, sizes], dim=1)


def own_neurons(model: nn.Module) -> list[str]:
    """Names of the neurons of a ReSpike that are not `LIF` itself: their equations are not known here."""
    layers = [layer for layers in plain(model).lif_layers().values() for layer in layers]
    return sorted({layer.name for layer in layers if type(layer) is not LIF})


def spike_statistics(sums: Tensor, layers: Sequence[str]) -> dict:
    """What `SpikeMeter.sums()` holds, for `energy_report`: {"clips", "mean", "std", "layers"}.

    mean, std: accumulates a clip, over clips. layers: name -> {"mean", "std", "rate", "dense"} with spikes a neuron
    and step, and dense MACs a clip. layers: `SpikeMeter.layers`.
    """
    rows = {}
    for name, (clips, total, squares, spikes, steps, dense) in zip([*layers, "total"], sums.tolist(), strict=True):
        clips = clips or math.nan
        mean = total / clips
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
        rate = rates if isinstance(rates, float) else rates.get(name)
        if rate is None:
            raise UserError(f"expected a firing rate of every layer, found none of {name}")
        layers[name] = {"mean": rate * layer["dense_existing"], "std": 0.0, "rate": rate, "dense": layer["dense"]}
    return {"clips": 0, "mean": sum(layer["mean"] for layer in layers.values()), "std": 0.0, "layers": layers}
