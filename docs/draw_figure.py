"""Draws docs/respike.png: real key and residual frames of a demo video above the network's plan.

python docs/draw_figure.py data/demo/videos/move_right/test0002_move_right_f_nm_np1_fr_goo_0.avi
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import numpy
import torch

from dataset.decode import decode_frames
from dataset.residual import key_residual_split

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

STRIDE, FRAMES = 4, 8
ANN, SNN, FUSE, TEXT = "#2f6db5", "#c4572b", "#6b4fa0", "#222222"


def box(axes, x, y, width, height, text, colour):
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fc=colour, ec="none", alpha=0.92))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=10)


def arrow(axes, x0, y0, x1, y1):
    axes.annotate("", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="-|>", color="#666666", lw=1.2))


def main(path: str) -> None:
    frames = decode_frames(path, range(8, 8 + FRAMES))
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]
    _, residual = key_residual_split(clip, STRIDE)
    residual = (0.5 + residual[0] / (2 * residual.abs().max())).permute(0, 1, 3, 4, 2).clamp(0, 1).numpy()
    figure, axes = plt.subplots(figsize=(11, 5.2), dpi=110)
    axes.set_xlim(0, 11), axes.set_ylim(0, 5.2), axes.axis("off")
    for segment in range(FRAMES // STRIDE):
        for step in range(STRIDE):
            x, side = 0.35 + (segment * STRIDE + step) * 1.3, 1.15
            image = frames[segment * STRIDE] if step == 0 else numpy.asarray(residual[segment, step - 1])
            axes.imshow(image, extent=(x, x + side, 3.75, 3.75 + side), aspect="auto", zorder=2)
            name, colour = ("key frame", ANN) if step == 0 else (f"residual {step}", SNN)
            axes.text(x + side / 2, 5.02, name, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xlim(0, 11), axes.set_ylim(0, 5.2)
    names = ["stem", "stage 1", "stage 2", "stage 3", "stage 4"]
    for number, name in enumerate(names):
        x = 1.55 + number * 1.55
        box(axes, x, 2.55, 1.15, 0.55, name, ANN)
        box(axes, x, 0.45, 1.15, 0.55, name, SNN)
        if number:
            box(axes, x + 0.1, 1.5, 0.95, 0.5, "attend", FUSE)
            arrow(axes, x + 0.57, 2.53, x + 0.57, 2.04)
            axes.annotate(
                "", (x + 0.57, 1.02), (x + 0.57, 1.48), arrowprops=dict(arrowstyle="<|-|>", color="#666666", lw=1.2)
            )
            for y in (2.82, 0.72):
                arrow(axes, x - 0.37, y, x - 0.03, y)
    axes.text(0.1, 2.82, "ResNet\n(what is there)", color=ANN, fontsize=10, va="center")
    axes.text(0.1, 0.72, "spiking ResNet\n(what moves)", color=SNN, fontsize=10, va="center")
    box(axes, 9.55, 1.45, 1.2, 0.6, "pool, join,\nclassify", "#444444")
    arrow(axes, 8.95, 2.75, 9.6, 2.1)
    arrow(axes, 8.95, 0.8, 9.6, 1.4)
    axes.text(0.35, 3.5, "8 frames of a generated video, stride 4", fontsize=9, color=TEXT)
    figure.savefig(Path(__file__).with_name("respike.png"), bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1])
