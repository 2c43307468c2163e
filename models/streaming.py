"""ReSpike on frames that come one by one: a prediction after every residual frame.

All that one frame leaves for the next is in a `StreamState`, which the functions here take and return. The modules of
the network hold nothing, so one network serves any number of streams.

    state = StreamState(segments=4)                  # T / stride of the training
    state = start_segment(model, key, state)         # a key frame: the ResNet and the keys and values of the fusions
    logits, state = step(model, residual, state)     # each residual frame: one time step of the spiking ResNet

After `segments` whole segments the logits are those of `ReSpike.forward` on the same clip. From then on they are those
of the last `segments` segments.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.neurons import LIF, lif
from models.respike import SIZE_MULTIPLE, ReSpike
from utils.errors import UserError


@dataclass(frozen=True)
class StreamState:
    """What a stream of B videos is at: its current segment, and the logits of the segments before."""

    segments: int  # that a prediction is over, the current one included
    logits: tuple[Tensor, ...] = ()  # [B, classes] of each segment before, `segments` at most
    current: Tensor | None = None  # [B, classes], of the current segment up to the latest frame
    ann: Tensor | None = None  # [B, C_ann]: the key frame's features, mean over pixels
    contexts: tuple[tuple[Tensor, ...] | None, ...] = ()  # what each fusion keeps of the key frame (`context`)
    membranes: tuple[Tensor | None, ...] = ()  # [B, C, H, W] of each LIF layer, in forward order; None stands for zero
    snn: Tensor | None = None  # [B, C]: the SNN's features, mean over pixels, summed over the steps
    steps: int = 0  # residual frames of the current segment


def check_neurons(model: ReSpike) -> None:
    """Raise UserError for neurons of another type than "lif", whose state is not known here."""
    layers = [layer for stage in model.lif_layers().values() for layer in stage]
    other = next((layer for layer in layers if type(layer) is not LIF), None)
    if other is not None:
        raise UserError(f"a stream carries membranes of lif neurons only; this network has {other.name}")


@torch.no_grad()
def start_segment(model: ReSpike, key: Tensor, state: StreamState) -> StreamState:
    """Begin a segment with its key frame, [B, 3, H, W], normalised. Membranes start at zero.

    Raises UserError for neurons of another type than "lif", whose state is not known here; ValueError for a network
    in training mode, and for a key frame of another shape.
    """
    if model.training:
        raise ValueError("a stream needs the running statistics of batch norm: call model.eval() first")
    if key.dim() != 4 or key.shape[1] != 3 or key.shape[2] % SIZE_MULTIPLE or key.shape[3] % SIZE_MULTIPLE:
        raise ValueError(
            f"a key frame must be [B, 3, H, W], H and W multiples of {SIZE_MULTIPLE}, got {list(key.shape)}"
        )
    check_neurons(model)
    layers = [layer for stage in model.lif_layers().values() for layer in stage]
    ann, contexts = None, [None] * len(model.fusions)
    if model.ann is not None:
        ann = model.ann.stem(key)
        for stage, fusion in enumerate(model.fusions):
            ann = model.ann.stages[stage](ann)  # [B, C_ann, H', W']
            if fusion is not None:
                contexts[stage] = fusion.context(ann)
        ann = ann.movedim(1, -1).mean((1, 2))
    before = state.logits if state.current is None else (*state.logits, state.current)[-state.segments :]
    return StreamState(state.segments, before, None, ann, tuple(contexts), (None,) * len(layers))


@torch.no_grad()
def step(model: ReSpike, residual: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """One residual frame, [B, 3, H, W], normalised as the training's (`dataset.residual`).

    Returns (logits [B, classes], the state after this frame). The logits are the mean over the segments, of which the
    current one is judged by its frames so far.
    """
    membranes, snn = state.membranes, state.snn
    if model.snn is not None:
        membranes, features = _spiking_step(model, residual, state)
        pooled = features[0].movedim(1, -1).mean((1, 2))  # [B, C]
        snn = pooled if snn is None else snn + pooled
    steps = state.steps + 1
    features = [part for part in (state.ann, None if snn is None else snn / steps) if part is not None]
    current = model.head(torch.cat(features, dim=1))
    logits = torch.stack((*state.logits, current)[-state.segments :]).mean(0)
    return logits, replace(state, current=current, membranes=membranes, snn=snn, steps=steps)


def _spiking_step(model: ReSpike, residual: Tensor, state: StreamState) -> tuple[tuple[Tensor, ...], Tensor]:
    """(membranes after the step, features of the last stage [1, B, C, H', W'])"""
    before, after = iter(state.membranes), []

    def fire(layer: LIF, current: Tensor) -> Tensor:
        """Layers fire in the order of the membranes."""
        spikes, v = lif(current, layer.parameters_, next(before), layer.backend)
        after.append(v)
        return layer.counted(spikes)

    x, spikes = model.snn.stem(residual[None], functools.partial(fire, model.snn.stages[0][0].lif1), state.steps)
    for stage, fusion, context in zip(model.snn.stages, model.fusions, state.contexts, strict=True):
        for block in stage:
            neurons = functools.partial(fire, block.lif1), functools.partial(fire, block.lif2)
            x, spikes = block(x, spikes, neurons=neurons, first_step=state.steps)[0], None
        if fusion is not None:
            x = fusion.fuse(x, context)
    return tuple(after), x
