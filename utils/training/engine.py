"""One epoch of training, one pass of evaluation. Takes values, never command-line arguments."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dataset.clips import VideoTable
from dataset.residual import key_residual_split
from dataset.video import VideoBatch, collate
from utils.device import autocast
from utils.errors import LocalError, OtherProcessError, UserError, worker_error
from utils.progress import Progress
from utils.runtime import ALONE, Processes
from utils.training.feed import BrokenVideos
from utils.training.metrics import ClipScores, FiringRates, VideoScores

# On a GPU, losses are read and the bar is written once in so many steps: each reading waits for the GPU.
_STEPS_BETWEEN_READINGS = 10
# What PyTorch says where a data loading process was killed, or where memory or files ran out.
_SIGNS_OF_LACK = (
    "exited unexpectedly", "killed by signal", "shared memory", "unable to resize file", "allocate memory",
    "No space left", "Too many open files", "Connection reset",
)  # fmt: skip


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN."""


@dataclass
class TrainPosition:
    """Where training stands: so many clips of epoch `epoch`'s order are done, with these sums
    (`ClipScores.sums`) over all processes."""

    epoch: int = 0
    clips: int = 0
    scores: list[float] | None = None


def cosine_with_warmup(epoch: int, epochs: int, warmup_epochs: int) -> float:
    """Learning-rate factor of an epoch: linear up to 1 over the warm-up, then a cosine to 0 at `epochs`."""
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    progress = (epoch - warmup_epochs) / max(1, epochs - warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_one_epoch(
    network: nn.Module,
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
    processes: Processes = ALONE,
    broken: BrokenVideos | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_save: Callable[[], bool] = lambda: False,
    save: Callable[[], None] = lambda: None,
    on_first_batch: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float] | None:
    """Train from `position` to the end of its epoch and move `position` along.

    network: as `Processes.replicate` gives it. loader: over a `dataset.batch_sampler.TrainBatchSampler`. An optimizer
    step is the mean over the clips of its `accumulation_steps` batches on all processes.

    `should_stop`, `should_save` and `save` are asked and called between optimizer steps; what one process
    answers all follow. Returns the epoch's metrics over all processes, or None where `should_stop` said
    so: then `position` says how far it got. Raises NonFiniteLossError before the step that would follow
    (on a GPU within a few steps), and UserError where a process cannot go on: `position` is then the
    last optimizer step's too.
    """
    network.train()
    loader.batch_sampler.set_position(position.epoch, position.clips)
    sizes = loader.batch_sampler.sizes()  # clips of each batch, over all processes
    steps_done = loader.batch_sampler.steps_done()
    scores = ClipScores(device, position.scores if processes.is_main else None)
    incoming = _Incoming(loader, device, broken or BrokenVideos())
    watch = _LossWatch(
        loader.dataset.videos, 1 if device.type == "cpu" else _STEPS_BETWEEN_READINGS, processes, steps_done
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    backward = _Backward(network, criterion, scaler, watch, device, precision)
    optimizer.zero_grad(set_to_none=True)
    settled = scores.sums.clone()  # as they were at the last optimizer step
    progress = Progress(
        steps_done + len(sizes), f"epoch {position.epoch + 1}/{epochs}", "batch", steps_done, shown=processes.is_main
    )
    try:
        with progress:
            for first in range(0, len(sizes), accumulation_steps):
                group = sizes[first : first + accumulation_steps]  # the last one of an epoch may be shorter
                trained_clips = 0
                for number, size in enumerate(group):
                    batch = incoming.next()
                    asked = number == 0
                    agreed = processes.agree(
                        stop=asked and should_stop(), save=asked and should_save(),
                        failed=incoming.failure is not None, clips=len(batch.labels),
                    )  # fmt: skip
                    if agreed.failed:
                        raise incoming.failure or OtherProcessError
                    if agreed.stop or agreed.save:
                        watch.read()
                        position.scores = processes.sum(settled).tolist()
                    if agreed.stop:
                        return None
                    if agreed.save:
                        save()
                    last = number == len(group) - 1
                    if not agreed.empty:  # else nobody trains on this batch: every process has a part in the gradient
                        key, residual = key_residual_split(batch.clips, stride, precision)
                        if on_first_batch is not None:
                            on_first_batch(key, residual)
                            on_first_batch = None
                        # The step is the mean over its clips; gradients are averaged over processes after it.
                        share = size / sum(group) * len(batch.labels) * processes.count / agreed.clips
                        logits, loss = backward(key, residual, batch, share, synchronise=last)
                        scores.add(logits, batch.labels, loss)
                        trained_clips += agreed.clips
                    elif last and trained_clips:
                        processes.mean_gradients(network)
                    incoming.clips += agreed.clips
                    progress.advance(loss=watch.shown, clips_per_s=f"{incoming.clips_per_second():.1f}")
                if trained_clips:
                    _optimizer_step(network, optimizer, scaler, clip_norm)
                optimizer.zero_grad(set_to_none=True)
                position.clips += sum(group)
                settled = scores.sums.clone()
            watch.read()
    except UserError:  # in all processes, or none
        position.scores = processes.sum(settled).tolist()
        raise
    position.scores = processes.sum(settled).tolist()  # stopped before the next epoch, a run reports the same
    result = ClipScores.result(torch.tensor(position.scores, dtype=torch.float64))
    counted = {"train_clips": int(position.scores[3])}  # fewer than the epoch has where videos could not be read
    return {"train_loss": result["loss"], "train_clip_top1": result["top1"], **counted, **incoming.result()}


class _Backward:
    """Forward and backward of one batch."""

    def __init__(self, network, criterion, scaler, watch: "_LossWatch", device, precision):
        self._network, self._criterion, self._scaler, self._watch = network, criterion, scaler, watch
        self._device, self._precision = device, precision

    def __call__(
        self, key: Tensor, residual: Tensor, batch: VideoBatch, share: float, synchronise: bool
    ) -> tuple[Tensor, Tensor]:
        """(logits, loss); gradients of loss * share are added up, over processes only if `synchronise`."""
        keep_apart = contextlib.nullcontext()
        if not synchronise and isinstance(self._network, DistributedDataParallel):
            keep_apart = self._network.no_sync()
        with keep_apart:
            with autocast(self._device, self._precision):
                logits = self._forward(key, residual)
                loss = self._criterion(logits.float(), batch.labels)
            self._watch.add(loss, batch.videos)
            self._scaler.scale(loss * share).backward()
        return logits, loss

    def _forward(self, key: Tensor, residual: Tensor) -> Tensor:
        try:
            return self._network(key, residual)
        except UserError as error:
            if not isinstance(self._network, DistributedDataParallel):
                raise
            raise LocalError(str(error)) from error  # other processes may be in the middle of theirs


def _optimizer_step(network: nn.Module, optimizer, scaler, clip_norm: float | None) -> None:
    if clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    scaler.step(optimizer)
    scaler.update()


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
    processes: Processes = ALONE,
    broken: BrokenVideos | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Clip and video accuracy in percent and as counts, loss and firing rates, over all processes; None
    where `should_stop` cut it off.

    model: not the replicated one, with the same weights in every process. loader: over a
    `dataset.batch_sampler.EvalBatchSampler`. Raises UserError where a process cannot go on.
    """
    model.eval()
    processes.share_buffers(model)
    criterion = nn.CrossEntropyLoss()
    clips = ClipScores(device)
    videos = VideoScores(len(loader.dataset.videos), classes, device)
    incoming = _Incoming(loader, device, broken or BrokenVideos())
    # One autocast context for the whole pass: the weights are cast once, not for every batch.
    with (
        FiringRates(model) as rates,
        autocast(device, precision),
        Progress(loader.batch_sampler.steps, task, unit="batch", shown=processes.is_main) as progress,
    ):
        for _ in range(loader.batch_sampler.steps):
            batch = incoming.next()  # empty past the end of this process's own
            agreed = processes.agree(stop=should_stop(), failed=incoming.failure is not None)
            if agreed.failed:
                raise incoming.failure or OtherProcessError
            if agreed.stop:
                return None
            if len(batch.labels):
                key, residual = key_residual_split(batch.clips, stride, precision)
                logits = model(key, residual).float()
                clips.add(logits, batch.labels, criterion(logits, batch.labels))
                videos.add(logits, batch.labels, batch.videos)
            progress.advance()
    clip_sums, video_sums = processes.sum(clips.sums), processes.sum(videos.sums())
    clip_result, video_result = ClipScores.result(clip_sums), VideoScores.result(video_sums)
    return {
        "loss": clip_result["loss"],
        "clip_top1": clip_result["top1"],
        "clip_top5": clip_result["top5"],
        "video_top1": video_result["top1"],
        "video_top5": video_result["top5"],
        "counts": {
            "clips": int(clip_sums[3]), "clip_top1": int(clip_sums[1]), "clip_top5": int(clip_sums[2]),
            "videos": int(video_sums[2]), "video_top1": int(video_sums[0]), "video_top5": int(video_sums[1]),
        },
        "firing_rate": rates.per_stage(processes.sum(rates.sums())),
    }  # fmt: skip


def to_device(batches: Iterable[VideoBatch], device: torch.device) -> Iterator[VideoBatch]:
    """The batches on the device; on a GPU the next one is copied, as uint8, while this one is used."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = VideoBatch(*(tensor.to(device, non_blocking=True) for tensor in batch[:3]), batch.failed)
            done = side.record_event()
        if ahead is not None:
            yield _taken(*ahead, device)
        ahead = copied, done
    if ahead is not None:
        yield _taken(*ahead, device)


def _taken(batch: VideoBatch, copied: torch.cuda.Event, device: torch.device) -> VideoBatch:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in batch[:3]:
        tensor.record_stream(stream)  # not to be reused by the side stream while this one reads it
    return batch


def _batches(loader: DataLoader, broken: BrokenVideos) -> Iterator[VideoBatch]:
    try:
        iterator = iter(loader)
        # PyTorch would raise a worker's death wherever the main thread happens to be, in the middle of an
        # optimizer step too. Left alone it notices when it next waits for a batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for batch in iterator:
            broken.check(batch, loader.dataset.videos)
            yield batch
    except UserError as error:
        raise worker_error(error) from error
    except (RuntimeError, OSError) as error:
        if not any(words in str(error) for words in _SIGNS_OF_LACK):
            raise  # a fault of this code: the traceback says where
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if str(error).startswith("Caught ") else " ".join(lines)  # else a worker's traceback
        raise UserError(f"a data loading process died ({reason}); fewer -j, or more memory or /dev/shm") from error


class _Incoming:
    """The loader's batches on the device. It remembers a failure instead of raising it, so that all
    processes can leave together, and measures clips per second and the share of time spent waiting."""

    def __init__(self, loader: DataLoader, device: torch.device, broken: BrokenVideos):
        self._batches = to_device(_batches(loader, broken), device)
        self._started = time.perf_counter()
        self._waited = 0.0
        self.clips = 0
        self.failure: UserError | None = None

    def next(self) -> VideoBatch:
        """The next batch; an empty one where there is none, or none can be had."""
        asked = time.perf_counter()
        batch = None
        try:
            batch = next(self._batches, None)
        except UserError as error:
            self.failure = error
        self._waited += time.perf_counter() - asked
        return collate([]) if batch is None else batch

    def clips_per_second(self) -> float:
        return self.clips / (time.perf_counter() - self._started)

    def result(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._started
        return {"clips_per_second": self.clips / elapsed, "data_wait_share": self._waited / elapsed}


class _LossWatch:
    """Reads losses every so often, stops all processes on one that is not finite, and knows which videos
    made it."""

    def __init__(self, videos: VideoTable, every: int, processes: Processes, batches_done: int):
        self._videos, self._every, self._processes, self._read = videos, every, processes, batches_done
        self._unread: list[tuple[Tensor, Tensor]] = []
        self.shown = "-"  # the latest loss, for the progress bar

    def add(self, loss: Tensor, videos: Tensor) -> None:
        self._unread.append((loss.detach(), videos))
        if len(self._unread) >= self._every:
            self.read()

    def read(self) -> None:
        losses = torch.stack([loss for loss, _ in self._unread]).tolist() if self._unread else []
        wrong = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if self._processes.agree(failed=bool(wrong)).failed:
            if not wrong:
                raise OtherProcessError
            names = ", ".join(self._videos.path(video) for video in self._unread[wrong[0]][1].tolist())
            raise NonFiniteLossError(
                f"batch {self._read + wrong[0] + 1}: the loss became {losses[wrong[0]]}; videos of that batch: {names}"
            )
        self._read += len(losses)
        if losses:
            self.shown = f"{losses[-1]:.4f}"
        self._unread.clear()
