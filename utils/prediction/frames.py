"""A network that is shown a video frame by frame."""

from typing import NamedTuple

import torch
from torch import Tensor

from dataset.residual import key_residual_split, normalised
from models import ReSpike
from models.streaming import StreamState, start_segment, step
from utils.runtime import Runtime


class Judged(NamedTuple):
    """A frame and what it tells. Pictures are uint8 [3, H, W]."""

    frame: Tensor
    key: Tensor
    reference: Tensor | None  # what the residual was taken from; None for a key frame
    probabilities: Tensor | None  # [classes]; None before the first residual frame


class FrameByFrame:
    """A network that is shown a video frame by frame, each uint8 [3, size, size], as `Clips.centre` crops it."""

    def __init__(self, model: ReSpike, runtime: Runtime):
        self._model, self._runtime, self._trained = model, runtime, model.trained
        self.state = StreamState(segments=self._trained.frames // self._trained.stride)
        self._frames = 0
        self._key = self._previous = self._probabilities = None

    def show(self, frame: Tensor) -> Judged:
        on_device, reference = frame.to(self._runtime.device), None
        with torch.no_grad(), self._runtime.autocast():
            if self._frames % self._trained.stride == 0:
                self._key = frame
                self.state = start_segment(self._model, self._as_input(normalised(on_device[None])), self.state)
            else:
                reference = self._previous if self._trained.residual == "previous" else self._key
                # A segment of two frames, of which the first is what the second is compared with.
                pair = torch.stack([reference.to(self._runtime.device), on_device])[None]
                minus = "none" if self._trained.residual == "none" else "key"
                residual = key_residual_split(pair, 2, minus=minus)[1][:, 0, 0]
                logits, self.state = step(self._model, self._as_input(residual), self.state)
                self._probabilities = logits[0].double().softmax(0).cpu()
        self._frames += 1
        self._previous = frame
        return Judged(frame, self._key, reference, self._probabilities)

    def _as_input(self, frame: Tensor) -> Tensor:
        return frame.to(self._runtime.precision or torch.float32).contiguous(memory_format=torch.channels_last)
