"""A whole training run: epochs, selection, metrics, checkpoints, and leaving when asked to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from utils.checkpoint import check_settings, load_checkpoint, save_checkpoint
from utils.device import peak_memory_bytes
from utils.engine import NonFiniteLossError, TrainPosition, evaluate, train_one_epoch
from utils.errors import UserError
from utils.pictures import key_residual_picture
from utils.run_folder import RunFolder
from utils.seed import random_state, set_random_state
from utils.stopping import StopRequest

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
    order: dict  # what the order of the clips follows from; in mid-epoch, a checkpoint with another is refused
    selection: str  # which videos the best epoch is chosen on
    flags: dict  # of the script
    position: TrainPosition
    best: dict = field(default_factory=lambda: dict(NO_BEST))

    def save(self, path: Path) -> None:
        """Write all of it and the random state to `path`, atomically. Raises UserError."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        rest = {name: getattr(self, name) for name in ("order", "selection", "flags", "best")}
        rest |= {"position": vars(self.position), "random": random_state()}
        save_checkpoint(path, {"model_settings": self.settings, **parts, **rest})

    def restore(self, path: Path, run: RunFolder, flags_that_may_differ: set[str]) -> None:
        """Become what `save` wrote to `path`, and say which flags differ. Raises UserError."""
        state = load_checkpoint(path)
        check_settings(path, state["model_settings"], self.settings)
        position = TrainPosition(**state["position"])
        if position.batches > 0:
            for name, value in self.order.items():
                if state["order"][name] != value:
                    raise UserError(
                        f"{path}: stopped in mid-epoch with another {name} ({state['order'][name]}, now {value}); "
                        "continue with the same one until the epoch ends"
                    )
        self.position = position
        self.model.load_state_dict(state["model"])
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, hyperparameters, strict=True):
            group.update(values)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])
        print(f"resumed from {path}: epoch {position.epoch + 1}, batch {position.batches}")
        for flag, value in state["flags"].items():
            if flag not in flags_that_may_differ and self.flags.get(flag) != value:
                print(f"note: --{flag.replace('_', '-')} was {value}, is now {self.flags.get(flag)}")
        if state["selection"] == self.selection and run.best.exists():
            self.best = state["best"]
        elif state["best"] != NO_BEST:
            print("note: the best epoch so far was chosen elsewhere or on other videos; it is chosen anew from here")


def fit(
    state: TrainingState,
    train_loader: DataLoader,
    selection_loader: DataLoader,
    run: RunFolder,
    *,
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
) -> bool:
    """Train from `state.position` to `epochs`, scoring on `selection_loader` after each epoch.

    learning_rate: epoch -> rate. The others as `train_one_epoch` takes them.

    Every epoch adds a line of metrics and last.pt, the best so far best.pt. Returns False where
    SIGINT or SIGTERM cut it short; last.pt then holds the very step. Raises UserError.
    """
    passes = dict(device=device, precision=precision, stride=stride)
    run.begin(state.position.epoch)
    picture = None if run.has_events() else _picture_writer(run)
    with StopRequest() as stop:
        while state.position.epoch < epochs:
            epoch = state.position.epoch
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(epoch)
            try:
                trained = train_one_epoch(
                    state.model, train_loader, state.optimizer, state.scaler, **passes,
                    epochs=epochs, position=state.position, label_smoothing=label_smoothing,
                    accumulation_steps=accumulation_steps, clip_norm=clip_norm,
                    should_stop=stop.requested, on_first_batch=picture,
                )  # fmt: skip
            except NonFiniteLossError as error:
                raise _with_checkpoint(error, state, run) from error
            picture = None
            scored = None
            if trained is not None:
                task = f"{selected_on} {epoch + 1}/{epochs}"
                scored = evaluate(
                    state.model, selection_loader, classes, **passes, task=task, should_stop=stop.requested
                )
            if scored is None:
                state.save(run.last)
                print(
                    f"stopped by {stop.name} in epoch {epoch + 1} after batch {state.position.batches}; "
                    "continue with --resume auto"
                )
                return False
            _finish_epoch(state, run, trained, scored, epochs, selected_on, device)
    return True


def _finish_epoch(
    state: TrainingState, run: RunFolder, trained: dict, scored: dict, epochs: int, selected_on: str, device
) -> None:
    epoch = state.position.epoch
    run.add_metrics({
        "epoch": epoch,
        **trained,
        f"{selected_on}_loss": scored["loss"],
        **{name: scored[name] for name in ("clip_top1", "clip_top5", "video_top1", "video_top5", "firing_rate")},
        "evaluated_on": selected_on,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "peak_memory_bytes": peak_memory_bytes(device),
    })  # fmt: skip
    print(
        f"epoch {epoch + 1}/{epochs}: loss {trained['train_loss']:.4f}, "
        f"train clip top-1 {trained['train_clip_top1']:.1f} %, "
        f"{selected_on} clip {scored['clip_top1']:.1f} %, video {scored['video_top1']:.1f} %, "
        f"{trained['clips_per_second']:.1f} clips/s, {100 * trained['data_wait_share']:.0f} % waiting for data",
        flush=True,
    )
    improved = scored["video_top1"] > state.best["video_top1"]
    if improved:
        state.best = {"epoch": epoch, "video_top1": scored["video_top1"]}
    # The state after this epoch is the one a resumed run starts the next with.
    state.position = TrainPosition(epoch=epoch + 1)
    if improved:
        state.save(run.best)
    state.save(run.last)


def _with_checkpoint(error: NonFiniteLossError, state: TrainingState, run: RunFolder) -> UserError:
    path = run.path / "nonfinite.pt"
    state.save(path)
    return UserError(
        f"epoch {state.position.epoch + 1}, {error}; the state at that moment is in {path}; "
        "try a lower -lr, --clip-norm or --no-amp"
    )


def _picture_writer(run: RunFolder) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def write(key: torch.Tensor, residual: torch.Tensor) -> None:
        run.add_picture("key_and_residual_frames", key_residual_picture(key, residual))

    return write
