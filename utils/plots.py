"""Pictures of a network at work and of runs.

python -m utils.plots RUN... --out curves.png              training curves of several runs
python -m utils.plots CHECKPOINT --clip VIDEO --out FOLDER firing rates, spikes and attention for one video
"""

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import argparse
from pathlib import Path

from torch import Tensor

from dataset.decode import decode_frames
from dataset.index import probe
from dataset.residual import key_residual_split
from models import Network, load_network
from utils.errors import ArgumentParser, UserError
from utils.figures import check_format, save_figure
from utils.files import writing
from utils.pictures.network import firing_rate_figure, fusion_figure, raster_figure
from utils.pictures.recording import record
from utils.pictures.runs import curves_figure, read_metrics
from utils.prediction.clips import Clips
from utils.script import run_script


def read_clip(model: Network, video: Path) -> Tensor:
    """uint8 [1, T, 3, H, W]: the middle clip of a video, as the checkpoint of `model` samples it. Raises UserError."""
    frames, clips = probe(video).frames, Clips(model.trained)
    (place,) = clips.sampling.places(frames)
    return clips.centre(decode_frames(video, clips.sampling.at(frames, place)))[None]


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
        names = [run.resolve().name for run in args.paths]
        if len(set(names)) < len(names):
            names = [str(run) for run in args.paths]
        save_figure(args.out, curves_figure(dict(zip(names, map(read_metrics, args.paths), strict=True))))
        written = [args.out]
    print(*(f"wrote {file}" for file in written), sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
