"""What a test shows beside its accuracy: confusion and accuracy of classes, calibration, the predictions themselves."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.files import writing


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """labels, predicted: int64 [videos] -> counts int64 [classes, classes], a row for each true class."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def per_class(matrix: Tensor, classes: Sequence[str]) -> dict[str, dict]:
    """From the confusion: {class: {"videos", "top1" in percent}} for each class that has videos."""
    rows = zip(classes, matrix.sum(1).tolist(), matrix.diagonal().tolist(), strict=True)
    return {name: {"videos": videos, "top1": 100 * hits / videos} for name, videos, hits in rows if videos}


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[Tensor, float]:
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


def write_predictions(
    file: Path, paths: Sequence[str], labels: Tensor, probabilities: Tensor, classes: Sequence[str]
) -> None:
    """A line a video: its path, its class, the predicted class, and the probability of every class."""
    predicted = probabilities.argmax(1).tolist()
    rows = zip(paths, labels.tolist(), predicted, probabilities.tolist(), strict=True)
    _write(
        file, ["video", "label", "predicted", *classes],
        ([path, classes[label], classes[guess], *(f"{p:.6g}" for p in row)] for path, label, guess, row in rows),
    )  # fmt: skip


def write_confusion(file: Path, matrix: Tensor, classes: Sequence[str]) -> None:
    """A row for each true class, a column for each predicted one; counts of videos."""
    rows = zip(classes, matrix.tolist(), strict=True)
    _write(file, ["true class", *classes], ([name, *counts] for name, counts in rows))


def _write(file: Path, header: Sequence, rows: Iterable[Sequence]) -> None:
    with writing(file), open(file, "w", newline="", errors="surrogateescape") as opened:
        csv.writer(opened).writerows([header, *rows])
