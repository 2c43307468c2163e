"""One epoch of training, one pass of evaluation. Takes values, never command-line arguments."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset.residual import key_residual_split
from dataset.video import VideoBatch
from utils.device import autocast
from utils.errors import UserError, worker_error
from utils.metrics import ClipScores, FiringRates, VideoScores
from utils.progress import Progress

# On a GPU, losses are read and the bar is written once in so many steps: each reading waits for the GPU.
_STEPS_BETWEEN_READINGS = 10


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN."""


@dataclass
class TrainPosition:
    """Where training stands: `batches` of epoch `epoch` are done, with these sums (`ClipScores.state`)."""

    epoch: int = 0
    batches: int = 0
    scores: list[float] | None = None


def cosine_with_warmup(epoch: int, epochs: int, warmup_epochs: int) -> float:
    """Learning-rate factor of an epoch: linear up to 1 over the warm-up, then a cosine to 0 at `epochs`."""
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    progress = (epoch - warmup_epochs) / max(1, epochs - warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    stride: int,
    epochs: int,
    position: TrainPosition,
    label_smoothing: float = 0.0,
    accumulation_steps: int = 1,
    clip_norm: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_first_batch: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float] | None:
    """Train from `position` to the end of its epoch and move `position` along.

    Returns the epoch's metrics, or None where `should_stop` said so: then `position` says how far it
    got, always at the end of an optimizer step. Raises NonFiniteLossError before the step that would
    follow (on a GPU within a few steps).
    """
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    loader.sampler.set_epoch(position.epoch, position.batches * loader.batch_size)
    scores = ClipScores(device, position.scores)
    total = position.batches + len(loader)
    every = 1 if device.type == "cpu" else _STEPS_BETWEEN_READINGS
    watch = _LossWatch(loader.dataset, every, position.batches)
    clock = _Clock()
    optimizer.zero_grad(set_to_none=True)
    with Progress(total, f"epoch {position.epoch + 1}/{epochs}", unit="batch", start=position.batches) as progress:
        for batch in clock.timed(to_device(loader, device)):
            key, residual = key_residual_split(batch.clips, stride)
            if on_first_batch is not None:
                on_first_batch(key, residual)
                on_first_batch = None
            with autocast(device, precision):
                logits = model(key, residual)
                loss = criterion(logits.float(), batch.labels)
            watch.add(loss, batch.videos)
            # The last group of an epoch may be shorter: it is averaged over what it has.
            group = position.batches // accumulation_steps * accumulation_steps
            scaler.scale(loss / (min(group + accumulation_steps, total) - group)).backward()
            scores.add(logits, batch.labels, loss)
            position.batches += 1
            if position.batches % accumulation_steps == 0 or position.batches == total:
                if clip_norm is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if position.batches < total and should_stop():
                    watch.read()
                    position.scores = scores.state()
                    return None
            clock.clips += len(batch.labels)
            progress.advance(loss=watch.shown, clips_per_s=f"{clock.clips_per_second():.1f}")
    watch.read()
    position.scores = scores.state()  # a run stopped between here and the next epoch reports the same sums
    result = scores.result()
    return {"train_loss": result["loss"], "train_clip_top1": result["top1"], **clock.result()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    classes: int,
    *,
    device: torch.device,
    precision: torch.dtype | None,
    stride: int,
    task: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Clip and video accuracy in percent, loss and firing rates; None where `should_stop` cut it off."""
    model.eval()
    criterion = nn.CrossEntropyLoss()
    clips = ClipScores(device)
    videos = VideoScores(len(loader.dataset.records), classes, device)
    loader.sampler.set_epoch(0)
    # One autocast context for the whole pass: the weights are cast once, not for every batch.
    with (
        FiringRates(model) as rates,
        autocast(device, precision),
        Progress(len(loader), task, unit="batch") as progress,
    ):
        for batch in to_device(loader, device):
            key, residual = key_residual_split(batch.clips, stride)
            logits = model(key, residual).float()
            clips.add(logits, batch.labels, criterion(logits, batch.labels))
            videos.add(logits, batch.labels, batch.videos)
            progress.advance()
            if should_stop():
                return None
    clip_result, video_result = clips.result(), videos.result()
    return {
        "loss": clip_result["loss"],
        "clip_top1": clip_result["top1"],
        "clip_top5": clip_result["top5"],
        "video_top1": video_result["top1"],
        "video_top5": video_result["top5"],
        "videos": video_result["videos"],
        "firing_rate": rates.per_stage(),
    }


def to_device(loader: DataLoader, device: torch.device) -> Iterator[VideoBatch]:
    """The loader's batches on the device; on a GPU the next one is copied, as uint8, while this one is used."""
    batches = _batches(loader)
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = VideoBatch(*(tensor.to(device, non_blocking=True) for tensor in batch))
            done = side.record_event()
        if ahead is not None:
            yield _taken(*ahead, device)
        ahead = copied, done
    if ahead is not None:
        yield _taken(*ahead, device)


def _taken(batch: VideoBatch, copied: torch.cuda.Event, device: torch.device) -> VideoBatch:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)  # not to be reused by the side stream while this one reads it
    return batch


def _batches(loader: DataLoader) -> Iterator[VideoBatch]:
    try:
        yield from loader
    except UserError as error:
        raise worker_error(error) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"a data loading process died ({reason}); fewer -j, or more memory or /dev/shm") from error


class _LossWatch:
    """Reads losses every so often, stops on one that is not finite, and knows which videos made it."""

    def __init__(self, dataset, every: int, batches_done: int):
        self._dataset, self._every, self._read = dataset, every, batches_done
        self._unread: list[tuple[Tensor, Tensor]] = []
        self.shown = "-"  # the latest loss, for the progress bar

    def add(self, loss: Tensor, videos: Tensor) -> None:
        self._unread.append((loss.detach(), videos))
        if len(self._unread) >= self._every:
            self.read()

    def read(self) -> None:
        if not self._unread:
            return
        losses = torch.stack([loss for loss, _ in self._unread]).tolist()
        for loss, (_, videos) in zip(losses, self._unread, strict=True):
            self._read += 1
            if not math.isfinite(loss):
                names = ", ".join(self._dataset.records[video].path for video in videos.tolist())
                raise NonFiniteLossError(f"batch {self._read}: the loss became {loss}; videos of that batch: {names}")
        self.shown = f"{losses[-1]:.4f}"
        self._unread.clear()


class _Clock:
    """Clips per second and the share of time spent waiting for data."""

    def __init__(self):
        self._started = time.perf_counter()
        self._waited = 0.0
        self.clips = 0

    def timed(self, batches: Iterator[VideoBatch]) -> Iterator[VideoBatch]:
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def clips_per_second(self) -> float:
        return self.clips / (time.perf_counter() - self._started)

    def result(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._started
        return {"clips_per_second": self.clips / elapsed, "data_wait_share": self._waited / elapsed}
