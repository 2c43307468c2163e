"""Training curves as a picture."""

from pathlib import Path

from utils.figures import drawn, new_figure, save_figure


def save_curves(file: Path, history: list[dict], title: str) -> None:
    """Write a PNG of two plots: accuracy by epoch in training and testing, and the last test's accuracy by time step.

    history: one dict an epoch, with "train_last_step", "test_last_step", "test_video" and "test_per_step".
    Raises UserError if the file cannot be written.
    """
    figure = new_figure(10, 4)
    by_epoch, by_step = figure.subplots(1, 2)
    epochs = [line["epoch"] + 1 for line in history]
    labels = {
        "train_last_step": "training, last step",
        "test_last_step": "test, last step",
        "test_video": "test, video",
    }
    for name, label in labels.items():
        by_epoch.plot(epochs, [line[name] for line in history], marker=".", label=label)
    by_epoch.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102), title=drawn(title))
    by_epoch.legend()
    steps = history[-1]["test_per_step"]
    by_step.plot(range(1, len(steps) + 1), steps, marker=".")
    by_step.set(xlabel="time step", ylabel="test accuracy (%)", ylim=(0, 102), title=f"after {epochs[-1]} epochs")
    save_figure(file, figure)
