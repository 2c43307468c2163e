"""What a test shows beside its accuracy: confusion of classes, accuracy of each, the predictions themselves."""

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
