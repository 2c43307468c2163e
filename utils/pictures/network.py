"""Pictures of a network at work: its clips, firing rates, spikes, and the fusion of its branches.

A function `..._figure` draws what it is given; `utils.figures` writes the figure to a file or makes a tensor of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from dataset.residual import IMAGENET_MEAN, IMAGENET_STD
from utils.figures import COLOURS, drawn, new_figure
from utils.pictures.recording import Recording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLIPS_SHOWN = 4
_SEGMENTS_SHOWN = 2
_FRAMES_SHOWN = 8  # of a network without residual frames
_ROWS_SHOWN = 4  # key frames with their attention
_NEURONS_SHOWN = 40  # of a layer, in the raster


def key_residual_picture(key: Tensor, residual: Tensor) -> Tensor:
    """A row a clip: a key frame, then its residual frames, for the first segments: [3, H, W] in [0, 1].

    key [B, K, 3, H, W], residual [B, K, S, 3, H, W]. Grey in a residual is no change, brighter and
    darker is what came and went.
    """
    shown = _SEGMENTS_SHOWN if residual.shape[2] else _FRAMES_SHOWN
    key, residual = key[:_CLIPS_SHOWN, :shown].float(), residual[:_CLIPS_SHOWN, :shown].float()
    low, high = key.amin(), key.amax()
    key = (key - low) / (high - low).clamp(min=1e-6)
    if residual.numel():
        residual = _grey_if_still(residual)
    tiles = torch.cat([key[:, :, None], residual], dim=2)  # [B, K, 1+S, 3, H, W]
    return make_grid(tiles.flatten(0, 2).cpu(), nrow=tiles.shape[1] * tiles.shape[2], padding=1)


def _grey_if_still(residual: Tensor) -> Tensor:
    """A residual of either sign in [0, 1]."""
    return 0.5 + 0.5 * residual / residual.abs().amax().clamp(min=1e-6)


def firing_rate_figure(recording: Recording) -> Figure:
    """Firing rate by layer and time step. Needs a network with an SNN."""
    rates = 100 * recording.firing_rates()
    steps = rates.shape[1]
    figure = new_figure(2.6 + 0.6 * steps, 5)
    axes = figure.subplots()
    image = axes.imshow(rates.numpy(), aspect="auto", cmap="cividis", vmin=0)
    axes.set(xlabel="time step of a segment", ylabel="LIF layer", title="Firing rate", xticks=range(steps))
    axes.set_xticklabels(range(1, steps + 1))
    axes.set_yticks(range(len(rates)), recording.spikes)
    for row, line in enumerate(rates.tolist()):
        for step, rate in enumerate(line):
            dark = rate < 0.6 * float(rates.max())
            text = f"{rate:.1f}" if rate < 9.95 else f"{rate:.0f}"
            axes.text(step, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    figure.colorbar(image, label="neurons that fire (%)")
    return figure


def raster_figure(recording: Recording, clip: int = 0) -> Figure:
    """Spikes of the same few neurons of each layer at each residual frame of a clip. Needs a network with an SNN."""
    generator = torch.Generator().manual_seed(0)
    segments = recording.key_frames
    rows, colours = [], []
    for number, layer in enumerate(recording.spikes.values()):
        of_clip = layer[:, clip * segments : (clip + 1) * segments].flatten(2)  # [S, K, neurons]
        chosen = torch.randperm(of_clip.shape[2], generator=generator)[:_NEURONS_SHOWN].sort().values
        rows.append(of_clip[:, :, chosen].permute(2, 1, 0).flatten(1))  # [neurons, K*S]
        colours += [COLOURS[number // 4]] * len(chosen)
    raster, steps = torch.cat(rows), layer.shape[0]
    figure = new_figure(3 + 0.35 * segments * steps, 8)
    axes = figure.subplots()
    neuron, step = raster.nonzero(as_tuple=True)
    axes.scatter(
        step.numpy(), neuron.numpy(), marker="_", s=130, linewidths=1.2, color=[colours[n] for n in neuron.tolist()]
    )
    names, heights = list(recording.spikes), [len(part) for part in rows]
    for layer_end in torch.tensor(heights).cumsum(0).tolist()[:-1]:
        axes.axhline(layer_end - 0.5, color="0.85", linewidth=0.6, zorder=0)
    for segment in range(1, segments):
        axes.axvline(segment * steps - 0.5, color="0.4", linewidth=1, linestyle="--")
    middles = [sum(heights[:n]) + heights[n] / 2 for n in range(len(heights))]
    axes.set_yticks(middles, names)
    axes.tick_params(axis="y", length=0)
    axes.set(
        xlabel="residual frame (dashed: a new segment)", ylabel="LIF layer",
        title=f"Spikes of {_NEURONS_SHOWN} random neurons a layer",
        xlim=(-0.5, segments * steps - 0.5), ylim=(len(raster) - 0.5, -0.5),
        xticks=range(segments * steps), xticklabels=range(1, segments * steps + 1),
    )  # fmt: skip
    return figure


def fusion_figure(recording: Recording, rows: Iterable[int] | None = None, title: str = "") -> Figure:
    """A row a key frame: the key frame, its residual frames, and where the SNN looks in it, or where a fusion without
    attention changes its currents, at each fused stage.

    rows: key frames, as they are numbered in the recording; None takes the first few.
    """
    from matplotlib.colors import TwoSlopeNorm

    rows = list(range(len(recording.key)) if rows is None else rows)[:_ROWS_SHOWN]
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    key = (recording.key * deviation + mean).clamp(0, 1).movedim(1, -1).numpy()
    residual = _grey_if_still(recording.residual[rows]).movedim(2, -1).numpy()
    maps = {stage: looked_at[rows] for stage, looked_at in recording.fusion_maps().items()}
    reach = max([0.01, *(float((looked_at - 1).abs().max()) for looked_at in maps.values())])  # one scale for all
    scale = TwoSlopeNorm(1, max(0, 1 - reach), 1 + reach)
    steps = residual.shape[1]
    columns = 1 + steps + len(maps)
    figure = new_figure(1.35 * columns + 1, 1.4 * len(rows) + (0.8 if title else 0.5))
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for number, (line, row, moved) in enumerate(zip(panels, rows, residual, strict=True)):
        line[0].imshow(key[row])
        for panel, frame in zip(line[1:], moved, strict=False):
            panel.imshow(frame)
        for panel, looked_at in zip(line[1 + steps :], maps.values(), strict=True):
            whole = F.interpolate(looked_at[None, None, number], size=key.shape[1:3], mode="bilinear")[0, 0]
            panel.imshow(key[row].mean(-1), cmap="gray", vmin=0, vmax=1)
            image = panel.imshow(whole.numpy(), cmap="PuOr_r", norm=scale, alpha=0.7)
    names = ["key frame", *(f"residual {n}" for n in range(1, steps + 1)), *(f"{recording.fusion} {s}" for s in maps)]
    for panel, name in zip(panels[0], names, strict=True):
        panel.set_title(name.replace(" stage", "\nstage "), fontsize=9)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(drawn(title), fontsize=10)
    if maps:
        figure.colorbar(image, ax=panels, label=f"{recording.fusion} (1: even)", aspect=30, fraction=0.02, pad=0.01)
    return figure
