"""A whole training run: epochs, selection, metrics, checkpoints, and leaving when asked to."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset.clips import NO_VIDEO, VideoTable, clip_ids, clips_in_order
from utils.checkpoint import CheckpointError, check_settings, save_checkpoint
from utils.device import peak_memory_bytes
from utils.errors import OtherProcessError, UserError
from utils.plots import key_residual_picture
from utils.run_folder import RunFolder
from utils.runtime import Processes
from utils.seed import random_state, set_random_state
from utils.signals import StopRequest
from utils.training.engine import NonFiniteLossError, TrainPosition, evaluate, train_one_epoch
from utils.training.feed import BrokenVideos

NO_BEST = {"epoch": None, "video_top1": -1.0}


@dataclass
class TrainingState:
    """Everything a run needs to go on: what a checkpoint holds.

    The learning rate is no part of it: it is a function of the epoch and the flags, as are the
    optimizer's other settings, so that a resumed run follows the flags it is given.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: dict  # of the network; a checkpoint with others is refused
    clips: numpy.ndarray  # names of the training clips (`dataset.clips.clip_ids`) whose order an epoch shuffles
    selection: str  # which videos the best epoch is chosen on
    flags: dict  # of the script, and the number of processes
    position: TrainPosition
    best: dict = field(default_factory=lambda: dict(NO_BEST))
    restored_from: Path | None = None

    def save(self, path: Path, keep: int = 1) -> None:
        """Write all of it and the random state to `path`, atomically. Raises UserError."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        rest = {name: getattr(self, name) for name in ("selection", "flags", "best")}
        rest |= {"clips": torch.from_numpy(self.clips), "position": vars(self.position), "random": random_state()}
        save_checkpoint(path, {"model_settings": self.settings, **parts, **rest}, keep)

    def restore(self, path: Path, state: dict, flags_that_may_differ: set[str]) -> None:
        """Become what `utils.checkpoint.find_checkpoint` found, and say which flags differ. Raises UserError."""
        check_settings(path, state["model_settings"], self.settings)
        position = TrainPosition(**state["position"])
        if position.clips > 0 and state["flags"]["seed"] != self.flags["seed"]:
            raise UserError(
                f"{path}: stopped in mid-epoch with --seed {state['flags']['seed']}, now {self.flags['seed']}; "
                "continue with the same one until the epoch ends"
            )
        self.position, self.restored_from = position, path
        self.model.load_state_dict(state["model"])
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, hyperparameters, strict=True):
            group.update(values)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])
        print(f"resumed from {path}: epoch {position.epoch + 1}, clip {position.clips} of {len(self.clips)}")
        for flag, value in state["flags"].items():
            if flag not in flags_that_may_differ and self.flags.get(flag) != value:
                name = flag if flag == "processes" else f"--{flag.replace('_', '-')}"
                print(f"note: {name} was {value}, is now {self.flags.get(flag)}")
        # (A best of an epoch still to come is another try's, from before the run went back to this checkpoint.)
        is_past = state["best"] is not None and state["best"]["epoch"] <= position.epoch
        if is_past and state["selection"] == self.selection:
            self.best = state["best"]
        elif position.epoch > 0:
            print("note: the best epoch so far was chosen elsewhere or on other videos; it is chosen anew from here")


def in_checkpoint_order(
    videos: VideoTable, clips: numpy.ndarray, path: Path, state: dict
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(clips, their names): in the checkpoint's order, for the run to go on with the clips it was started
    with although videos have come or gone. Many more or fewer are another data set: it has its own order
    from the next epoch on; in mid-epoch, raises UserError."""
    names = state["clips"].numpy()
    kept, new = clips_in_order(videos, clips, names)
    gone = int((kept[:, 0] == NO_VIDEO).sum())
    if 10 * gone > len(names) or 10 * new > len(names):
        if state["position"]["clips"] > 0:
            raise UserError(
                f"{path}: stopped in mid-epoch with another set of training clips: of its {len(names)} clips {gone} "
                f"are not there, {new} are new; continue with the same one until the epoch ends"
            )
        print(f"note: the training clips are others from here: {gone} of {len(names)} are gone, {new} are new")
        return clips, clip_ids(videos, clips)
    if gone:
        print(f"note: {gone} of {len(names)} training clips are gone since the run started; their places stay empty")
    if new:
        print(f"note: {new} training clips are new since the run started and left out of it")
    return kept, names


def score(
    model: nn.Module, loader: DataLoader, classes: int, run: RunFolder, *, processes: Processes, epoch: int, **how
) -> None:
    """The test of a finished epoch: printed and written to test.json."""
    passes = {name: how.pop(name) for name in ("device", "precision", "stride")}
    with StopRequest() as stop:
        scored = evaluate(
            model, loader, classes, **passes, processes=processes, task="test", should_stop=stop.requested
        )
    if scored is None:
        print(f"stopped by {stop.name or 'a signal to another process'} in the test; --resume auto tests again")
        return
    processes.from_main(lambda: run.write_result({"after_epochs": epoch, **how, **scored}))
    counts = scored["counts"]
    print(
        f"test after {epoch} epochs: clip top-1 {scored['clip_top1']:.2f} %, video top-1 {scored['video_top1']:.2f} % "
        f"({counts['video_top1']} of {counts['videos']}), top-5 {scored['video_top5']:.2f} %"
    )


def fit(
    state: TrainingState,
    train_loader: DataLoader,
    selection_loader: DataLoader,
    run: RunFolder,
    *,
    processes: Processes,
    epochs: int,
    learning_rate: Callable[[int], float],
    classes: int,
    selected_on: str,
    device: torch.device,
    precision: torch.dtype | None,
    stride: int,
    label_smoothing: float,
    accumulation_steps: int,
    clip_norm: float | None,
    checkpoint_minutes: float,
    keep: int,
) -> bool:
    """Train from `state.position` to `epochs`, scoring on `selection_loader` after each epoch.

    learning_rate: epoch -> rate. checkpoint_minutes: between checkpoints in mid-epoch; 0 writes none.
    keep: checkpoints kept, last.pt among them. The others as `train_one_epoch` takes them.

    Every epoch adds a line of metrics and last.pt, the best so far best.pt. Returns False where a signal
    to any of the processes cut it short; last.pt then holds the very step. It does too where a process
    cannot go on (UserError): the others leave with it.
    """
    passes = dict(device=device, precision=precision, stride=stride, processes=processes)
    broken, broken_in_test = BrokenVideos(processes.count), BrokenVideos(processes.count)
    processes.from_main(lambda: run.begin(state.position.epoch))
    network = processes.replicate(state.model, device, accumulates=accumulation_steps > 1)
    clock = _CheckpointClock(checkpoint_minutes)
    pictures: list[Tensor] = []
    first_batch = None if run.has_events() else lambda *batch: pictures.append(key_residual_picture(*batch))

    def save() -> None:
        lines = processes.gather(broken.take() + broken_in_test.take())
        processes.from_main(lambda: _save_last(state, run, keep, lines))
        clock.restart()

    if state.restored_from not in (None, run.last):  # another than --resume auto would take, from now on its own
        save()
    with StopRequest() as stop:
        while state.position.epoch < epochs:
            epoch = state.position.epoch
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(epoch)
            try:
                trained = train_one_epoch(
                    network, train_loader, state.optimizer, state.scaler, **passes, broken=broken,
                    epochs=epochs, position=state.position, label_smoothing=label_smoothing,
                    accumulation_steps=accumulation_steps, clip_norm=clip_norm,
                    should_stop=stop.requested, should_save=clock.is_due, save=save,
                    on_first_batch=first_batch,
                )  # fmt: skip
                first_batch = scored = None
                if trained is not None:
                    task = f"{selected_on} {epoch + 1}/{epochs}"
                    scored = evaluate(
                        state.model,
                        selection_loader,
                        classes,
                        **passes,
                        broken=broken_in_test,
                        task=task,
                        should_stop=stop.requested,
                    )
            except UserError as error:  # in all processes: each knows that one cannot go on
                raise _saved(error, state, run, processes, save) from error
            if scored is None:
                save()
                print(
                    f"stopped by {stop.name or 'a signal to another process'} in epoch {epoch + 1} after "
                    f"{state.position.clips} clips; continue with --resume auto"
                )
                return False
            metrics = _metrics(state, trained, scored, selected_on, device)
            improved = scored["video_top1"] > state.best["video_top1"]
            if improved:
                state.best = {"epoch": epoch, "video_top1": scored["video_top1"]}
            # The state after this epoch is the one a resumed run starts the next with.
            state.position = TrainPosition(epoch=epoch + 1)
            processes.from_main(lambda: _record(run, metrics, epochs, pictures))  # noqa: B023 - called at once
            if improved:
                processes.from_main(lambda: state.save(run.best))
            save()
    return True


class _CheckpointClock:
    """Whether a checkpoint in mid-epoch is due."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._latest = time.monotonic()

    def is_due(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._latest >= self._seconds


def _save_last(state: TrainingState, run: RunFolder, keep: int, broken: list[str]) -> None:
    run.add_to_list("broken.txt", broken)
    state.save(run.last, keep)


def _saved(error: UserError, state: TrainingState, run: RunFolder, processes: Processes, save) -> UserError:
    """The error to leave with, after saving what is good."""
    is_own = not isinstance(error, OtherProcessError)
    agreed = processes.agree(stop=isinstance(error, NonFiniteLossError), failed=isinstance(error, CheckpointError))
    if agreed.failed:
        return error
    if agreed.stop:
        path = run.path / "nonfinite.pt"
        processes.from_main(lambda: state.save(path))
        advice = f"the state at that moment is in {path}; try a lower -lr, --clip-norm or --no-amp"
    else:
        save()
        advice = f"{run.last} holds all up to there"
    return UserError(f"epoch {state.position.epoch + 1}, {error}; {advice}") if is_own else error


def _metrics(state: TrainingState, trained: dict, scored: dict, selected_on: str, device: torch.device) -> dict:
    names = ("clip_top1", "clip_top5", "video_top1", "video_top5", "counts", "firing_rate")
    return {
        "epoch": state.position.epoch,
        **trained,
        f"{selected_on}_loss": scored["loss"],
        **{name: scored[name] for name in names},
        "evaluated_on": selected_on,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _record(run: RunFolder, metrics: dict, epochs: int, pictures: list[Tensor]) -> None:
    while pictures:
        run.add_picture("key_and_residual_frames", pictures.pop())
    run.add_metrics(metrics)
    on = metrics["evaluated_on"]
    print(
        f"epoch {metrics['epoch'] + 1}/{epochs}: loss {metrics['train_loss']:.4f}, "
        f"train clip top-1 {metrics['train_clip_top1']:.1f} %, "
        f"{on} clip {metrics['clip_top1']:.1f} %, video {metrics['video_top1']:.1f} %, "
        f"{metrics['clips_per_second']:.1f} clips/s, {100 * metrics['data_wait_share']:.0f} % waiting for data",
        flush=True,
    )
