"""Pictures of a network at work and of runs.

    python -m utils.plots RUN... --out curves.png              training curves of several runs
    python -m utils.plots CHECKPOINT --clip VIDEO --out FOLDER firing rates, spikes and attention for one video

A function `..._figure` draws what it is given; `utils.figures` writes the figure to a file or makes a tensor of it.
"""

from __future__ import annotations

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import argparse
import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from dataset.decode import decode_frames
from dataset.frame_sampling import SAMPLINGS
from dataset.index import probe
from dataset.residual import IMAGENET_MEAN, IMAGENET_STD, key_residual_split
from dataset.transforms import eval_short_side, eval_transforms
from models import Network, load_network
from models.attention import HEAD_WIDTH
from models.film import FilmFusion
from utils.errors import ArgumentParser, UserError
from utils.figures import check_format, new_figure, save_figure
from utils.files import writing
from utils.script import run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLIPS_SHOWN = 4
_SEGMENTS_SHOWN = 2
_FRAMES_SHOWN = 8  # of a network without residual frames
_ROWS_SHOWN = 4  # key frames with their attention
_NEURONS_SHOWN = 40  # of a layer, in the raster
_BINS = 15  # of confidence
_MOST_CLASSES_COUNTED = 12  # a larger confusion matrix shows no numbers
_MOST_CLASSES_NAMED = 120  # a larger one shows no names
# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", "-.", ":")


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
        residual = 0.5 + 0.5 * residual / residual.abs().amax().clamp(min=1e-6)
    tiles = torch.cat([key[:, :, None], residual], dim=2)  # [B, K, 1+S, 3, H, W]
    return make_grid(tiles.flatten(0, 2).cpu(), nrow=tiles.shape[1] * tiles.shape[2], padding=1)


# ---- what a network does with clips -------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """One forward pass, on the CPU. N = B*K key frames, the key frames of a clip beside each other."""

    key: Tensor  # float32 [N, 3, H, W], normalised
    residual: Tensor  # float32 [N, S, 3, H, W]
    logits: Tensor  # float32 [B, classes]
    spikes: dict[str, Tensor]  # LIF layer, "stage1.1" to "stage4.4" -> bool [S, N, C, H', W']
    attention: dict[str, Tensor]  # stage fused by attention -> float32 [N, S, Q, L], `attention_weights`
    modulation: dict[str, Tensor]  # stage fused by film -> float32 [N, h, w]: mean change of the currents at a place

    @property
    def fusion(self) -> str | None:
        """What `fusion_maps` show: "attention" or "modulation"; None without a fusion."""
        return "attention" if self.attention else "modulation" if self.modulation else None

    @property
    def key_frames(self) -> int:
        """K, of a clip."""
        return len(self.key) // len(self.logits)

    def firing_rates(self) -> Tensor:
        """[layers, S]: spikes of a layer at each time step over its neurons, clips and key frames."""
        return torch.stack([layer.float().flatten(1).mean(1) for layer in self.spikes.values()])

    def fusion_maps(self) -> dict[str, Tensor]:
        """Fused stage -> [N, h, w], divided by what it would be if it were even over the frame: how much of its
        attention the SNN gives to each token of the key frame, or how much film changes the currents at each place.
        For attention, an SNN token counts by the size of its input, the motion there."""
        moved = self.residual.abs().mean(2)  # [N, S, H, W]
        maps = {
            stage: change / (change.mean((1, 2), keepdim=True) + 1e-12) for stage, change in self.modulation.items()
        }
        for stage, weights in self.attention.items():
            moved_here = F.adaptive_avg_pool2d(moved, _grid(weights.shape[2], self.key)).flatten(2)  # [N, S, Q]
            share = moved_here + 1e-12  # where nothing moves, all tokens count alike
            share = share / share.sum((1, 2), keepdim=True)
            looked_at = torch.einsum("nsq,nsql->nl", share, weights) * weights.shape[3]
            maps[stage] = looked_at.unflatten(1, _grid(weights.shape[3], self.key))
        return maps


def _grid(tokens: int, frames: Tensor) -> tuple[int, int]:
    """Height and width of a grid of tokens over `frames` [..., H, W]."""
    height = round(math.sqrt(tokens * frames.shape[-2] / frames.shape[-1]))
    return height, tokens // height


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(32)), mean over heads: q [N, Q, C], k [N, L, C] -> float32 [N, Q, L]."""
    with torch.autocast(q.device.type, enabled=False):
        heads = zip(q.float().split(HEAD_WIDTH, dim=2), k.float().split(HEAD_WIDTH, dim=2), strict=True)
        scale = HEAD_WIDTH**-0.5
        total = sum((scale * q_head @ k_head.transpose(1, 2)).softmax(2) for q_head, k_head in heads)
    return total / (q.shape[2] // HEAD_WIDTH)


@torch.no_grad()
def record(model: Network, key: Tensor, residual: Tensor) -> Recording:
    """Run the network in eval mode on clips and keep its spikes, and its attention or modulation. It is left in the
    mode it was in.

    key [B, K, 3, H, W], residual [B, K, S, 3, H, W], as for `Network.forward`, on any device. Every LIF backend is
    recorded; a compiled network runs uncompiled.
    """
    device = next(model.parameters()).device
    key, residual = key.to(device), residual.to(device)
    spikes, queries, keys, modulation, was_training = {}, {}, {}, {}, model.training
    layers = {f"{stage}.{n}": layer for stage, group in model.lif_layers().items() for n, layer in enumerate(group, 1)}
    fusions = {f"stage{n}": fusion for n, fusion in enumerate(model.fusions, 1) if fusion is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers.items():
            # Each backend hands the spikes of a layer to `counted`, also the kernel that fires within a batch norm.
            def counted(fired: Tensor, name=name, layer=layer) -> Tensor:
                spikes[name] = (fired != 0).cpu()
                return type(layer).counted(layer, fired)

            layer.counted = counted
            stack.callback(delattr, layer, "counted")
        for stage, fusion in fusions.items():
            if isinstance(fusion, FilmFusion):

                def changed(module, inputs, fused: Tensor, stage=stage) -> None:  # [S, N, C, h, w]
                    modulation[stage] = (fused.float() - inputs[0].float()).abs().mean((0, 2)).cpu()

                stack.callback(fusion.register_forward_hook(changed).remove)
                continue
            for linear, found in ((fusion.attend_ann.to_q, queries), (fusion.attend_ann.to_k, keys)):
                hook = linear.register_forward_hook(
                    lambda module, inputs, output, found=found, stage=stage: found.__setitem__(stage, output)
                )
                stack.callback(hook.remove)
        stack.callback(model.train, was_training)
        logits = model.eval()(key, residual)
    steps = residual.shape[2]
    attention = {
        stage: attention_weights(queries[stage], keys[stage]).unflatten(1, (steps, -1)).cpu() for stage in queries
    }
    return Recording(
        key.flatten(0, 1).float().cpu(), residual.flatten(0, 1).float().cpu(), logits.float().cpu(), spikes,
        attention, modulation,
    )  # fmt: skip


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
        colours += [_COLOURS[number // 4]] * len(chosen)
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
    """A row a key frame: the key frame, its residual frames, and where the SNN looks in it, or where film changes its
    currents, at each fused stage.

    rows: key frames, as they are numbered in the recording; None takes the first few.
    """
    rows = list(range(len(recording.key)) if rows is None else rows)[:_ROWS_SHOWN]
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    key = (recording.key * deviation + mean).clamp(0, 1).movedim(1, -1).numpy()
    residual = recording.residual[rows]
    residual = (0.5 + 0.5 * residual / residual.abs().amax().clamp(min=1e-6)).movedim(2, -1).numpy()
    maps = {stage: looked_at[rows] for stage, looked_at in recording.fusion_maps().items()}
    reach = max([0.01, *(float((looked_at - 1).abs().max()) for looked_at in maps.values())])  # one scale for all
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
            image = panel.imshow(whole.numpy(), cmap="PuOr_r", vmin=1 - reach, vmax=1 + reach, alpha=0.7)
    names = ["key frame", *(f"residual {n}" for n in range(1, steps + 1)), *(f"{recording.fusion} {s}" for s in maps)]
    for panel, name in zip(panels[0], names, strict=True):
        panel.set_title(name.replace(" stage", "\nstage "), fontsize=9)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(title, fontsize=10)
    if maps:
        figure.colorbar(image, ax=panels, label=f"{recording.fusion} (1: even)", aspect=30, fraction=0.02, pad=0.01)
    return figure


# ---- how good its predictions are ---------------------------------------------------------------------


def confusion_figure(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """matrix: counts [classes, classes], a row for each true class, a column for each predicted one."""
    from matplotlib.colors import PowerNorm

    counts = torch.as_tensor(matrix).double()
    count = len(classes)
    named = count <= _MOST_CLASSES_NAMED
    side = max(5.0, 2.5 + 0.14 * count) if named else 13.0
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    # The root makes a confusion of a few percent visible.
    image = axes.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    hits, total = float(counts.trace()), float(counts.sum())
    axes.set(
        xlabel="predicted class", ylabel="true class",
        title=f"{hits:.0f} of {total:.0f} correct ({100 * hits / max(total, 1):.1f} %)",
    )  # fmt: skip
    size = 9 if count <= 30 else 6.5
    axes.set_xticks(range(count) if named else [], classes if named else [], rotation=90, fontsize=size)
    axes.set_yticks(range(count) if named else [], classes if named else [], fontsize=size)
    if count <= _MOST_CLASSES_COUNTED:
        for row, column in counts.nonzero().tolist():
            colour = "white" if share[row, column] > 35 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    return figure


def save_confusion(file: Path, matrix: Tensor, classes: Sequence[str]) -> None:
    """Write the picture of a confusion matrix, as `confusion_figure`. Raises UserError if it cannot be written."""
    save_figure(file, confusion_figure(matrix, classes))


def calibration(confidence: Tensor, correct: Tensor, bins: int = _BINS) -> tuple[Tensor, float]:
    """Predictions by their confidence, and the expected calibration error in percent (Guo et al., arXiv 1706.04599).

    confidence [n]: the largest probability of each prediction. correct [n]: whether it is right. Returns float64
    [bins, 3] (share of the predictions, their mean confidence, their accuracy; NaN in an empty bin), and the sum of
    share x |confidence - accuracy|.
    """
    confidence, correct = confidence.double(), correct.double()
    # Bins as in the paper: the upper edge belongs to a bin.
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    ones, sums = torch.ones_like(confidence), torch.zeros(bins, 3, dtype=torch.float64)
    sums.index_add_(0, number, torch.stack([ones, confidence, correct], dim=1))
    table = torch.cat([sums[:, :1] / len(confidence), sums[:, 1:] / sums[:, :1]], dim=1)
    error = (table[:, 0] * (table[:, 1] - table[:, 2]).abs()).nansum()
    return table, 100 * float(error)


def calibration_figure(confidence: Tensor, correct: Tensor, bins: int = _BINS) -> Figure:
    """Reliability diagram: accuracy against confidence. Arguments as for `calibration`."""
    table, error = calibration(confidence, correct, bins)
    share, _, accuracy = (100 * table).T
    middles = [100 * (n + 0.5) / bins for n in range(bins)]
    figure = new_figure(5, 5.5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(middles, accuracy.nan_to_num().tolist(), 92 / bins, color=_COLOURS[0], label="network")
    above.plot([0, 100], [0, 100], color="0.3", linestyle="--", label="perfect calibration")
    above.set(ylabel="accuracy (%)", ylim=(0, 100), title=f"Calibration error (ECE) {error:.1f} %")
    above.legend(loc="upper left")
    below.bar(middles, share.tolist(), 92 / bins, color="0.6")
    below.set(xlabel="confidence (%)", ylabel="predictions (%)", xlim=(0, 100))
    return figure


def save_calibration(file: Path, confidence: Tensor, correct: Tensor) -> None:
    """Write the reliability diagram, as `calibration_figure`. Raises UserError if it cannot be written."""
    save_figure(file, calibration_figure(confidence, correct))


# ---- runs side by side --------------------------------------------------------------------------------


def read_metrics(run: Path) -> list[dict]:
    """The epochs of a training run's metrics.jsonl. Raises UserError if there is none."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{run}: expected the folder of a training run, found no metrics.jsonl in it")
    lines = []
    for text in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a line that is being written, or was when the run was killed
            lines.append(json.loads(text))
    lines = [line for line in lines if "train_loss" in line]  # the closing line has what the whole run cost
    if not lines:
        raise UserError(f"{file}: expected lines with train_loss, found none; has the first epoch ended?")
    return lines


def curves_figure(runs: dict[str, list[dict]]) -> Figure:
    """Loss, accuracy and firing rates by epoch. runs: name -> lines of metrics.jsonl."""
    figure = new_figure(12, 4.2)
    loss, accuracy, firing = figure.subplots(1, 3)
    for (name, lines), colour in zip(runs.items(), _colours(len(runs)), strict=True):
        epochs = [line["epoch"] + 1 for line in lines]

        def draw(axes: Axes, values: list[float], style: str, epochs=epochs, colour=colour, **more) -> None:
            axes.plot(epochs, values, style, color=colour, marker=".", markersize=5, linewidth=1.3, **more)

        draw(loss, [line["train_loss"] for line in lines], "--")
        draw(loss, [line[f"{line['evaluated_on']}_loss"] for line in lines], "-", label=name)
        draw(accuracy, [line["train_clip_top1"] for line in lines], "--")
        draw(accuracy, [line["video_top1"] for line in lines], "-")
        for stage, style in zip(lines[-1]["firing_rate"], _LINE_STYLES, strict=False):
            draw(firing, [100 * line["firing_rate"][stage] for line in lines], style)
    loss.set(ylabel="loss", ylim=(0, None))
    accuracy.set(ylabel="top-1 accuracy (%)", ylim=(0, 102))
    firing.set(ylabel="firing rate (%)", ylim=(0, None))
    _explain_styles(loss, {"training": "--", "evaluation": "-"})
    _explain_styles(accuracy, {"training, clips": "--", "evaluation, videos": "-"})
    _explain_styles(firing, {f"stage {n}": style for n, style in enumerate(_LINE_STYLES, 1)})
    for axes in (loss, accuracy, firing):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)))
    return figure


def _explain_styles(axes: Axes, styles: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in styles.items()]
    axes.legend(
        handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(lines), fontsize=8, frameon=False,
        handlelength=1.8, columnspacing=1,
    )  # fmt: skip


def _colours(count: int) -> list:
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](number / (count - 1)) for number in range(count)]


# ---- the command line ---------------------------------------------------------------------------------


def read_clip(model: Network, video: Path) -> Tensor:
    """uint8 [1, T, 3, H, W]: the middle clip of a video, as the checkpoint of `model` samples it. Raises UserError."""
    trained = model.trained
    frames = probe(video).frames
    sampling = SAMPLINGS[trained.sampling](trained.frames, trained.flags["frame_stride"], 1)
    decoded = decode_frames(video, sampling.at(frames, sampling.places(frames)[0]))
    (transform,) = eval_transforms(trained.size, eval_short_side(trained.size, trained.flags["dset"]))
    return transform(torch.from_numpy(decoded).permute(0, 3, 1, 2))[None]


def draw_clip(checkpoint: Path, video: Path, out: Path) -> list[Path]:
    """Write firing_rates.png, spikes.png and attention.png (or modulation.png) of one video into the folder `out`.
    Raises UserError."""
    model = load_network(checkpoint)
    if model.snn is None:
        raise UserError(f"{checkpoint}: a network without an SNN; it has no spikes and no fusion to draw")
    with writing(out, about="out"):
        out.mkdir(parents=True, exist_ok=True)
    trained = model.trained
    recording = record(model, *key_residual_split(read_clip(model, video), trained.stride, minus=trained.residual))
    probability, label = recording.logits[0].softmax(0).max(0)
    title = f"predicted: {trained.classes[label]} ({100 * probability:.0f} %)"
    figures = {"firing_rates": firing_rate_figure(recording), "spikes": raster_figure(recording)}
    if recording.fusion:
        figures[recording.fusion] = fusion_figure(recording, title=title)
    for name, figure in figures.items():
        save_figure(out / f"{name}.png", figure)
    return [out / f"{name}.png" for name in figures]


def _by_name(folders: list[Path]) -> dict[str, Path]:
    """Folders by their last part, or by the whole path where last parts are alike."""
    names = [folder.resolve().name for folder in folders]
    return dict(zip(names if len(set(names)) == len(names) else map(str, folders), folders, strict=True))


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m utils.plots", description="Pictures of runs, and of a network at work.")
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN", help="run folders; with --clip, one checkpoint or run folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture: .png, .pdf or .svg; with "
        "--clip, a folder")  # fmt: skip
    parser.add_argument("--clip", type=Path, metavar="VIDEO", help="firing rates, spikes and attention for this video")
    args = parser.parse_args()
    if args.clip is not None and len(args.paths) > 1:
        raise UserError("--clip goes with one checkpoint")
    return args


def main() -> int:
    args = parse_args()
    if args.clip is not None:
        written = draw_clip(args.paths[0], args.clip, args.out)
    else:
        check_format(args.out)
        save_figure(args.out, curves_figure({name: read_metrics(run) for name, run in _by_name(args.paths).items()}))
        written = [args.out]
    print(*(f"wrote {file}" for file in written), sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
