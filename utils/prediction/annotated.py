"""Annotated videos: the prediction as it develops, beside what the network sees."""

from pathlib import Path

import numpy
from torch import Tensor

from dataset.decode import every_frame
from dataset.index import VideoInfo
from models import ReSpike
from utils.errors import UserError
from utils.prediction.clips import Clips, top
from utils.prediction.drawing import VideoWriter, draw
from utils.prediction.frames import FrameByFrame, Judged
from utils.runtime import Runtime
from utils.training.metrics import FiringRates

_NO_FRAME_RATE = 25.0  # of a video whose container names none


def save_annotated(model: ReSpike, runtime: Runtime, path: str, info: VideoInfo, target: Path) -> str | None:
    """Write the annotated video. Returns the error if the video cannot be decoded.

    path: of the video. info: what the index knows of it. target: path of the .mp4 file.
    """
    clips, trained = Clips(model.trained), model.trained
    if trained.sampling == "window":
        wanted = list(range(0, info.frames, trained.flags["frame_stride"]))
    else:  # frames of the whole video make one clip
        wanted = clips.sampling.at(info.frames, 0)
    shown = FrameByFrame(model, runtime)
    writer = VideoWriter(target, (info.fps or _NO_FRAME_RATE) * len(wanted) / info.frames)
    counts = numpy.bincount(wanted, minlength=info.frames)
    try:
        for index, rgb in enumerate(every_frame(path)):
            for _ in range(counts[index] if index < len(counts) else 0):  # a short video repeats frames
                with FiringRates(model) as rates:
                    judged = shown.show(clips.centre(rgb))
                fired = rates.per_stage() if judged.reference is not None else {}
                best = top(judged.probabilities, trained.classes)
                pictures = (judged.frame, judged.key, _visible_residual(judged, trained.residual))
                pictures = (None if part is None else part.permute(1, 2, 0).numpy() for part in pictures)
                writer.add(draw(*pictures, best, fired, f"{Path(path).name[:18]}, frame {index}"))
    except UserError as error:
        return str(error)
    writer.close()
    return None


def _visible_residual(judged: Judged, kind: str) -> Tensor | None:
    """uint8 [3, H, W]: grey if nothing moved; the frame itself for residuals of kind "none". None for a key frame."""
    if judged.reference is None:
        return None
    if kind == "none":
        return judged.frame
    return ((judged.frame.int() - judged.reference.int() + 255) // 2).byte()


def annotated_names(paths: list[str], folder: Path) -> list[Path]:
    """<name of the source>.mp4 for each; a number is added if the name is taken, by a source itself too."""
    taken, targets = {Path(path).resolve() for path in paths}, []
    for path in paths:
        target, count = folder / f"{Path(path).stem}.mp4", 1
        while target.resolve() in taken:
            count += 1
            target = folder / f"{Path(path).stem}-{count}.mp4"
        taken.add(target.resolve())
        targets.append(target)
    return targets
