"""One epoch of training, one pass of evaluation. Start reading here. Takes values, never command-line arguments."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataset.device_loader import DeviceLoader
from utils.progress import Progress
from utils.runtime import ALONE, Runtime
from utils.training.feed import Feed, Step, UnreadableVideos
from utils.training.metrics import ClipScores, FiringRates, LossWatch, StepLog, VideoScores, learned_by_neurons


@dataclass
class TrainPosition:
    """Where training stands: `clips` clips of the order of epoch `epoch` are done, with the sums of `ClipScores` of
    this rank."""

    epoch: int = 0
    clips: int = 0
    sums: Tensor | None = None

    def advance(self, clips: int, scores: ClipScores) -> None:
        self.clips += clips
        self.sums = scores.sums.clone()


def train_one_epoch(
    network: nn.Module,
    loader: DeviceLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    criterion: Callable[[Tensor, Tensor], Tensor],
    runtime: Runtime = ALONE,
    *,
    position: TrainPosition,
    accumulation_steps: int = 1,
    clip_norm: float | None = None,
    unreadable: UnreadableVideos | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_save: Callable[[], bool] = lambda: False,
    save: Callable[[], None] = lambda: None,
    log: StepLog = StepLog(),
) -> dict[str, float] | None:
    """Train from `position` to the end of its epoch. Every optimizer step moves `position` on.

    network: as `Runtime.replicate` gives it.
    loader: over a `dataset.batch_sampler.TrainBatchSampler`.
    criterion: logits [B, classes], labels [B] -> the mean loss over the batch.
    accumulation_steps: batches an optimizer step. The step is the mean over the clips of its batches in all ranks.
    clip_norm: largest norm of the gradient; None does not clip.
    should_stop, should_save: every rank calls them between optimizer steps. If any of them returns True, all ranks
        stop, or call `save`.
    log: curves within the epoch; every scalar given to `log.step` reaches steps.jsonl and TensorBoard.

    Returns the epoch's metrics over all ranks, or None if it was stopped. Each scalar reaches metrics.jsonl and
    TensorBoard under its name. Raises NonFiniteLossError before the optimizer step that the loss would spoil (on a
    GPU, within ten steps), and UserError if any rank cannot continue. `position` is left at the last completed step.
    """
    network.train()
    loader.batches.set_position(position.epoch, position.clips)
    feed = Feed(loader, runtime, unreadable or UnreadableVideos())
    scores = ClipScores(runtime.device, position.sums)
    losses = LossWatch(loader.videos, runtime)
    with Progress(loader.clips, f"epoch {position.epoch + 1}", "clip", position.clips, runtime.is_main) as progress:
        for step in feed.steps(accumulation_steps, should_stop, should_save):
            if step.stop or step.save:
                losses.check()
            if step.stop:
                return None
            if step.save:
                save()

            if step.count:
                train_step(network, step, optimizer, scaler, criterion, runtime, clip_norm, scores, losses)
            position.advance(step.order, scores)
            progress.advance(step.order, loss=losses.latest)
            log.step(scores, clips_per_second=feed.clips_per_second())
        losses.check()
    trained = ClipScores.result(runtime.sum(scores.sums))
    return {
        "train_loss": trained["loss"],
        "train_clip_top1": trained["top1"],
        "train_clips": trained["clips"],  # fewer than the epoch has if videos could not be read
        **feed.timing(),
    }


def train_step(
    network: nn.Module,
    step: Step,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    criterion: Callable[[Tensor, Tensor], Tensor],
    runtime: Runtime,
    clip_norm: float | None,
    scores: ClipScores,
    losses: LossWatch,
) -> None:
    """One optimizer step of `train_one_epoch`.

    step: with one batch at least.
    scores, losses: take what its batches give.
    The others are as for `train_one_epoch`.
    """
    for left, batch in zip(range(step.count - 1, -1, -1), step.batches, strict=True):
        with runtime.no_backward_sync(network, enabled=left > 0):
            with runtime.autocast():
                logits = network(batch.key, batch.residual)
                loss = criterion(logits.float(), batch.labels)
            # DDP takes the mean over ranks; the step is the mean over all its clips.
            share = len(batch.labels) * runtime.count / step.clips
            scaler.scale(loss * share).backward()
        scores.add(logits, batch.labels, loss)
        losses.add(loss, batch.videos)
    losses.check_now_and_then()
    if clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    runtime: Runtime = ALONE,
    *,
    task: str = "test",
    videos: VideoScores | None = None,
    unreadable: UnreadableVideos | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Clip and video accuracy in percent and as counts, cross-entropy loss and firing rates, over all ranks; None if
    `should_stop` returned True in any of them.

    model: not the replicated one; it has the same weights in every rank.
    loader: over a `dataset.batch_sampler.EvalBatchSampler`.
    videos: takes the probabilities of this rank's videos; None keeps them here.

    Each scalar reaches metrics.jsonl and TensorBoard under its name. Raises UserError if any rank cannot continue.
    """
    model.eval()
    runtime.share_buffers(model)
    criterion = nn.CrossEntropyLoss()
    clips = ClipScores(runtime.device)
    videos = videos or VideoScores(len(loader.videos), runtime.device)
    feed = Feed(loader, runtime, unreadable or UnreadableVideos())
    # One autocast context for the whole pass: the weights are cast once, not for every batch.
    with (
        FiringRates(model) as rates,
        runtime.autocast(),
        Progress(loader.batches.clips, task, "clip", shown=runtime.is_main) as progress,
    ):
        for batch in feed.batches(should_stop):
            logits = model(batch.key, batch.residual).float()
            clips.add(logits, batch.labels, criterion(logits, batch.labels))
            videos.add(logits, batch.labels, batch.videos)
            progress.advance(len(batch.labels))
    if feed.stopped:
        return None
    clip, video = ClipScores.result(runtime.sum(clips.sums)), VideoScores.result(runtime.sum(videos.sums()))
    return {
        "loss": clip["loss"],
        "clip_top1": clip["top1"],
        "clip_top5": clip["top5"],
        "video_top1": video["top1"],
        "video_top5": video["top5"],
        "counts": {
            "clips": clip["clips"], "clip_top1": clip["top1_hits"], "clip_top5": clip["top5_hits"],
            "videos": video["videos"], "video_top1": video["top1_hits"], "video_top5": video["top5_hits"],
        },
        "firing_rate": rates.per_stage(runtime.sum(rates.sums())), **learned_by_neurons(model),
    }  # fmt: skip
