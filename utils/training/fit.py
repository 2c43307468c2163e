"""A whole training run: epochs, the best epoch, metrics, checkpoints, and leaving when asked to."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from dataset.device_loader import DeviceLoader
from utils.checkpoint import (
    EARLIER_FLAGS,
    EARLIER_SETTINGS,
    Checkpoint,
    CheckpointError,
    check_settings,
    save_checkpoint,
)
from utils.cuda_graphs import GraphedNetwork
from utils.device import peak_memory_bytes, random_state, set_random_state
from utils.errors import OtherProcessError, UserError
from utils.pictures.network import key_residual_picture
from utils.run_folder import RunFolder
from utils.runtime import Runtime
from utils.signals import StopRequest
from utils.training.engine import TrainPosition, evaluate, train_one_epoch
from utils.training.feed import UnreadableVideos
from utils.training.flags import NOT_TRAINING_FLAGS
from utils.training.metrics import NonFiniteLossError, StepLog
from utils.training.precise_bn import measure_statistics

NO_BEST_EPOCH = {"epoch": None, "video_top1": -1.0}


@dataclass
class TrainingState:
    """Everything that a run needs to continue: what a checkpoint holds.

    The learning rate is not part of it. It is a function of the epoch and the flags, as are the optimizer's other
    settings, so a resumed run follows the flags that it is given.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    runtime: Runtime
    settings: dict  # of the network; a checkpoint with others is refused
    clip_ids: numpy.ndarray  # and labels of the training clips (`dataset.clips.clip_ids`); an epoch shuffles the order
    evaluated_clips: str  # fingerprint of the clips that the best epoch is chosen on
    flags: dict  # of the script
    position: TrainPosition
    best: dict = field(default_factory=lambda: dict(NO_BEST_EPOCH))
    restored_from: Path | None = None
    earlier_seconds: float = 0.0  # that the run took before this start

    def __post_init__(self):
        self._started = time.monotonic()
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # its peak, as torch.optim.lr_scheduler names it

    def seconds(self) -> float:
        """That the run has taken. What was lost when a start was killed does not count."""
        return self.earlier_seconds + time.monotonic() - self._started

    def save(self, path: Path, keep: int = 1) -> None:
        """Write all of it and the random state to `path`, atomically. All ranks call it. Raises UserError."""
        sums = self.position.sums
        if sums is None:
            sums = torch.zeros(4, dtype=torch.float64, device=self.runtime.device)
        scores = self.runtime.sum(sums).tolist()
        self.runtime.from_main(self._write, path, keep, scores)

    def _write(self, path: Path, keep: int, scores: list[float]) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        computed = {"processes": self.runtime.count, "precision": self.runtime.precision_name}
        state |= {"model_settings": self.settings, "flags": self.flags | computed}
        state["optimizer_name"] = type(self.optimizer).__name__
        state |= {"clips": torch.from_numpy(self.clip_ids), "selection": self.evaluated_clips, "best": self.best}
        state["position"] = {"epoch": self.position.epoch, "clips": self.position.clips, "scores": scores}
        save_checkpoint(path, state | {"random": random_state(), "seconds": self.seconds()}, keep)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what the checkpoint holds, and print which flags differ. Raises UserError if it does not fit."""
        path, state = checkpoint
        try:
            self._restore(path, state)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            detail = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{path}: not a whole checkpoint of this network ({detail[:200]})") from error

    def _restore(self, path: Path, state: dict) -> None:
        check_settings(path, EARLIER_SETTINGS | state["model_settings"], self.settings)
        optimizer = type(self.optimizer).__name__
        check_settings(path, {"optimizer": state.get("optimizer_name", "SGD")}, {"optimizer": optimizer})
        epoch, clips, scores = (state["position"][name] for name in ("epoch", "clips", "scores"))
        if not (epoch >= 0 and 0 <= clips <= len(state["clips"])):
            raise UserError(
                f"{path}: its position is clip {clips} of epoch {epoch}, with {len(state['clips'])} clips an epoch; "
                "the file was changed, resume from another one"
            )
        flags = EARLIER_FLAGS | state["flags"]
        if clips > 0 and flags["seed"] != self.flags["seed"]:
            raise UserError(
                f"{path}: stopped in mid-epoch with --seed {flags['seed']}, now {self.flags['seed']}; "
                "continue with the same seed until the epoch ends"
            )
        for name, value in state["model"].items():
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(f"{path}: its weights {name} are not all finite; resume from an earlier checkpoint")
        self.restored_from = path
        self.earlier_seconds = state.get("seconds", 0.0)
        sums = None
        if scores and self.runtime.is_main:
            sums = torch.tensor(scores, dtype=torch.float64, device=self.runtime.device).reshape(4)
        self.position = TrainPosition(epoch, clips, sums)
        self.model.load_state_dict(state["model"])
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        self._begin_momentum()
        for group, values in zip(self.optimizer.param_groups, hyperparameters, strict=True):
            group.update(values)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])
        print(f"resumed from {path}: epoch {epoch + 1}, clip {clips} of {len(self.clip_ids)}")
        for flag, value in (self.flags | {"processes": self.runtime.count}).items():
            before = flags.get(flag, "not there")
            if flag not in NOT_TRAINING_FLAGS and value != before:
                name = flag if flag == "processes" else f"--{flag.replace('_', '-')}"
                print(f"note: {name} was {before}, is now {value}")
        # A best epoch later than this checkpoint comes from a continuation that was abandoned; ignore it.
        is_past = state["best"] is not None and state["best"]["epoch"] is not None and state["best"]["epoch"] <= epoch
        # An earlier checkpoint's fingerprint ends before the labels: whether they are the same is not known then.
        if is_past and self.evaluated_clips.startswith(state["selection"]):
            self.best = state["best"]
        elif epoch > 0:
            print("note: there is no best epoch so far on these videos and labels; it is chosen from here on")

    def _begin_momentum(self) -> None:
        """Parameters that were frozen until here have none beside others that have it, which fused SGD refuses. From
        zero, the first step is the one that a new optimizer takes."""
        states = self.optimizer.state
        if any(state.get("momentum_buffer") is not None for state in states.values()):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.requires_grad and states[parameter].get("momentum_buffer") is None:
                        states[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def cosine_with_warmup(epoch: int, epochs: int, warmup_epochs: int) -> float:
    """Learning-rate factor of an epoch: linear up to 1 over the warm-up, then a cosine to 0 at `epochs`."""
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    progress = (epoch - warmup_epochs) / max(1, epochs - warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def fit(
    state: TrainingState,
    train_loader: DeviceLoader,
    eval_loader: DeviceLoader,
    criterion: Callable[[Tensor, Tensor], Tensor],
    run: RunFolder,
    *,
    epochs: int,
    evaluated_on: str,
    schedule: Callable[[int], float],
    accumulation_steps: int,
    clip_norm: float | None,
    checkpoint_minutes: float,
    keep: int,
    log_every: int,
    precise_bn: int = 0,
    cuda_graphs: bool = False,
) -> bool:
    """Train from `state.position` to `epochs`. After each epoch the network is scored on `eval_loader`.

    criterion, accumulation_steps, clip_norm: as for `train_one_epoch`.
    evaluated_on: name of the videos of `eval_loader`, for metrics and output.
    schedule: epoch -> factor of each parameter group's learning rate.
    checkpoint_minutes: between checkpoints in mid-epoch; 0 writes none.
    keep: checkpoints kept, last.pt among them.
    log_every: optimizer steps between the lines of steps.jsonl; 0 writes none.
    precise_bn: training clips to measure batch norm's statistics on before each evaluation (`measure_statistics`); 0
        keeps the running ones.
    cuda_graphs: train by `GraphedNetwork`, in one process on a GPU with one batch an optimizer step.

    Every epoch adds a line of metrics and writes last.pt; the best epoch so far is in best.pt. Returns False if a
    signal to any rank cut the run short; last.pt then holds the very step. It also does if a rank cannot continue:
    all ranks then raise UserError.
    """
    runtime = state.runtime
    unreadable, unreadable_in_test = UnreadableVideos(), UnreadableVideos()
    runtime.from_main(run.begin, state.position.epoch, state.position.clips)
    runtime.from_main(_draw_clips, train_loader, run)
    if cuda_graphs:
        sample = train_loader.sample()
        network = GraphedNetwork(state.model, sample.key, sample.residual, runtime.precision)
    else:
        network = runtime.replicate(state.model, accumulates=accumulation_steps > 1)
    clock = _CheckpointClock(checkpoint_minutes)

    def save() -> None:
        runtime.from_main(run.add_to_list, "broken.txt", unreadable.take() + unreadable_in_test.take())
        state.save(run.last, keep)
        clock.restart()

    if state.restored_from not in (None, run.last):
        save()  # resumed from an older checkpoint: now it is the newest, so that --resume auto continues from here
    with StopRequest() as stop:
        while state.position.epoch < epochs:
            epoch = state.position.epoch
            for group in state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(epoch)
            rate = {"learning_rate": state.optimizer.param_groups[0]["lr"]}

            def log(values: dict, epoch=epoch, rate=rate) -> None:
                run.add_step({"epoch": epoch, "clips": state.position.clips, **values, **rate}, train_loader.clips)

            try:
                scored = None
                trained = train_one_epoch(
                    network, train_loader, state.optimizer, state.scaler, criterion, runtime,
                    position=state.position, accumulation_steps=accumulation_steps, clip_norm=clip_norm,
                    unreadable=unreadable, should_stop=stop.requested, should_save=clock.is_due, save=save,
                    log=StepLog(log_every, log, runtime, state.position.sums),
                )  # fmt: skip
                if trained is not None and precise_bn:
                    measured = measure_statistics(
                        state.model, train_loader, runtime, epoch=epoch, clips=precise_bn, unreadable=unreadable,
                        should_stop=stop.requested,
                    )  # fmt: skip
                    trained = None if measured is None else trained | measured
                if trained is not None:
                    task = f"{evaluated_on} {epoch + 1}/{epochs}"
                    scored = evaluate(
                        state.model, eval_loader, runtime, task=task, unreadable=unreadable_in_test,
                        should_stop=stop.requested,
                    )  # fmt: skip
            except UserError as error:  # in all ranks: each knows that one cannot continue
                raise _saved(error, state, run, save) from error
            if scored is None:
                save()
                print(
                    f"stopped by {stop.name or 'a signal to another process'} in epoch {epoch + 1} after "
                    f"{state.position.clips} clips; continue with --resume auto"
                )
                return False
            metrics = {"epoch": epoch, **trained, f"{evaluated_on}_loss": scored.pop("loss"), **scored, **rate}
            _end_epoch(state, run, metrics | {"evaluated_on": evaluated_on}, epochs)
            save()
    return True


def _end_epoch(state: TrainingState, run: RunFolder, metrics: dict, epochs: int) -> None:
    """Record the metrics of the present epoch, save best.pt if it is the best, and go on to the next."""
    epoch, improved = metrics["epoch"], metrics["video_top1"] > state.best["video_top1"]
    if improved:
        state.best = {"epoch": epoch, "video_top1": metrics["video_top1"]}
    # The state after this epoch is the one that a resumed run starts the next epoch with.
    state.position = TrainPosition(epoch + 1)
    metrics["peak_memory_bytes"] = peak_memory_bytes(state.runtime.device)
    state.runtime.from_main(run.add_metrics, metrics)
    on = metrics["evaluated_on"]
    print(
        f"epoch {epoch + 1}/{epochs}: loss {metrics['train_loss']:.4f}, "
        f"train clip top-1 {metrics['train_clip_top1']:.1f} %, "
        f"{on} clip {metrics['clip_top1']:.1f} %, video {metrics['video_top1']:.1f} %, "
        f"{metrics['clips_per_second']:.1f} clips/s, {100 * metrics['data_wait_share']:.0f} % waiting for data"
        + (
            f", batch norm measured in {metrics['precise_bn_seconds']:.1f} s" if "precise_bn_seconds" in metrics else ""
        ),
        flush=True,
    )
    if improved:
        state.save(run.best)


class _CheckpointClock:
    """Whether a checkpoint in mid-epoch is due."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._latest = time.monotonic()

    def is_due(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._latest >= self._seconds


def _saved(error: UserError, state: TrainingState, run: RunFolder, save: Callable[[], None]) -> UserError:
    """The error to leave with, after saving what is good."""
    is_own = not isinstance(error, OtherProcessError)
    not_finite, cannot_save = state.runtime.add(
        isinstance(error, NonFiniteLossError), isinstance(error, CheckpointError)
    )
    if cannot_save:
        return error
    if not_finite:
        path = run.path / "nonfinite.pt"
        state.save(path)
        advice = f"the state at that moment is in {path}; try a lower -lr, --clip-norm or --no-amp"
    else:
        save()
        advice = f"{run.last} holds all up to there"
    return UserError(f"epoch {state.position.epoch + 1}, {error}; {advice}") if is_own else error


def _draw_clips(loader: DeviceLoader, run: RunFolder) -> None:
    """Key and residual frames of a few clips, once in the life of a run."""
    if run.has_events():
        return
    try:
        clips = loader.first_clips(4)
    except UserError:  # --strict: training meets the same video, saves and reports it
        return
    if len(clips.labels):
        batch = loader.split(clips)
        run.add_picture("key_and_residual_frames", key_residual_picture(batch.key, batch.residual))
