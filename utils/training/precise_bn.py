"""Precise batch norm: running statistics measured anew, with the weights as they are, before the network is tested.

The running ones are an average of the last few batches of the training, seen with weights that have changed since.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from dataset.device_loader import DeviceLoader
from models.batch_norm import MeasuredStatistics
from utils.errors import UserError
from utils.progress import Progress
from utils.runtime import ALONE, Runtime
from utils.training.feed import Feed, UnreadableVideos


@torch.no_grad()
def measure_statistics(
    model: nn.Module,
    loader: DeviceLoader,
    runtime: Runtime = ALONE,
    *,
    epoch: int,
    clips: int,
    unreadable: UnreadableVideos | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Give every batch norm of `model` that is trained the mean and variance of what it sees on the first `clips`
    training clips of an epoch, augmented as in training. None, and nothing changes, if `should_stop` returned True in
    any rank.

    model: not the replicated one; it has the same weights in every rank.
    loader: over a `dataset.batch_sampler.TrainBatchSampler`. A batch is normalised by its statistics over all ranks, so
        that W ranks with batches of N find what one rank with batches of W*N does.
    clips: of all ranks together; all clips of an epoch if it has fewer.

    Returns {"precise_bn_clips", "precise_bn_seconds"}. Raises UserError if no clip can be read or any rank cannot
    continue.
    """
    started = time.perf_counter()
    model.train()
    loader.batches.set_first(epoch, clips)
    feed = Feed(loader, runtime, unreadable or UnreadableVideos())
    seen = 0
    with (
        MeasuredStatistics(model) as statistics,
        torch.compiler.set_stance("force_eager"),  # a graph compiled for training updates the running statistics
        runtime.autocast(),
        Progress(sum(loader.batches.sizes()), "batch norm", "clip", shown=runtime.is_main) as progress,
    ):
        for step in feed.steps(1, should_stop, lambda: False):
            if step.stop:
                return None
            for batch in step.batches:
                model(batch.key, batch.residual)
            seen += step.clips
            progress.advance(step.order)
        if not seen:
            raise UserError("--precise-bn: none of its training clips can be read")
        statistics.take()
    return {"precise_bn_clips": seen, "precise_bn_seconds": time.perf_counter() - started}
