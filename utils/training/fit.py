"""A whole training run: epochs, the best epoch, metrics, checkpoints, and leaving when asked to."""

import math
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
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


@dataclass
class Training:
    """A whole training run. After each epoch the network is scored on `eval_loader`.

    Every epoch adds a line of metrics and writes last.pt; the best epoch so far is in best.pt.
    """

    state: TrainingState
    train_loader: DeviceLoader
    eval_loader: DeviceLoader
    criterion: Callable[[Tensor, Tensor], Tensor]  # as for `train_one_epoch`
    run: RunFolder
    _: KW_ONLY
    epochs: int
    evaluated_on: str  # name of the videos of `eval_loader`, for metrics and output
    schedule: Callable[[int], float]  # epoch -> factor of each parameter group's learning rate
    accumulation_steps: int  # as for `train_one_epoch`
    clip_norm: float | None  # likewise
    checkpoint_minutes: float  # between checkpoints in mid-epoch; 0 writes none
    keep: int  # checkpoints kept, last.pt among them
    log_every: int  # optimizer steps between the lines of steps.jsonl; 0 writes none
    # Training clips to measure batch norm's statistics on before each evaluation (`measure_statistics`); 0 keeps the
    # running ones.
    precise_bn: int = 0
    cuda_graphs: bool = False  # train by `GraphedNetwork`, in one process on a GPU with one batch an optimizer step

    def __post_init__(self):
        self._unreadable, self._unreadable_in_test = UnreadableVideos(), UnreadableVideos()
        self._saved_at = time.monotonic()

    def fit(self) -> bool:
        """Train from `state.position` to `epochs`. Returns False if a signal to any rank cut the run short; last.pt
        then holds the very step. It also does if a rank cannot continue: all ranks then raise UserError."""
        state, run, runtime = self.state, self.run, self.state.runtime
        runtime.from_main(run.begin, state.position.epoch, state.position.clips)
        runtime.from_main(_draw_clips, self.train_loader, run)
        network = self._network()
        if state.restored_from not in (None, run.last):
            self._save()  # resumed from an older checkpoint: now it is the newest, so --resume auto continues from here
        with StopRequest() as stop:
            while state.position.epoch < self.epochs:
                epoch = state.position.epoch
                for group in state.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * self.schedule(epoch)
                try:
                    metrics = self._epoch(network, stop.requested)
                except UserError as error:  # in all ranks: each knows that one cannot continue
                    raise self._with_advice(error) from error
                if metrics is None:
                    self._save()
                    print(
                        f"stopped by {stop.name or 'a signal to another process'} in epoch {epoch + 1} after "
                        f"{state.position.clips} clips; continue with --resume auto"
                    )
                    return False
                self._end_epoch(metrics)
                self._save()
        return True

    def _network(self) -> nn.Module:
        if self.cuda_graphs:
            sample = self.train_loader.sample()
            return GraphedNetwork(self.state.model, sample.key, sample.residual, self.state.runtime.precision)
        return self.state.runtime.replicate(self.state.model, accumulates=self.accumulation_steps > 1)

    def _epoch(self, network: nn.Module, should_stop: Callable[[], bool]) -> dict | None:
        """The rest of the present epoch, and its evaluation: the metrics of both, or None if it was stopped."""
        state, runtime, epoch = self.state, self.state.runtime, self.state.position.epoch
        rate = {"learning_rate": state.optimizer.param_groups[0]["lr"]}

        def log(values: dict) -> None:
            line = {"epoch": epoch, "clips": state.position.clips, **values, **rate}
            self.run.add_step(line, self.train_loader.clips)

        trained = train_one_epoch(
            network, self.train_loader, state.optimizer, state.scaler, self.criterion, runtime,
            position=state.position, accumulation_steps=self.accumulation_steps, clip_norm=self.clip_norm,
            unreadable=self._unreadable, should_stop=should_stop, should_save=self._is_due, save=self._save,
            log=StepLog(self.log_every, log, runtime, state.position.sums),
        )  # fmt: skip
        if trained is not None and self.precise_bn:
            measured = measure_statistics(
                state.model, self.train_loader, runtime, epoch=epoch, clips=self.precise_bn,
                unreadable=self._unreadable, should_stop=should_stop,
            )  # fmt: skip
            trained = None if measured is None else trained | measured
        if trained is None:
            return None
        scored = evaluate(
            state.model, self.eval_loader, runtime, task=f"{self.evaluated_on} {epoch + 1}/{self.epochs}",
            unreadable=self._unreadable_in_test, should_stop=should_stop,
        )  # fmt: skip
        if scored is None:
            return None
        metrics = {"epoch": epoch, **trained, f"{self.evaluated_on}_loss": scored.pop("loss"), **scored, **rate}
        return metrics | {"evaluated_on": self.evaluated_on}

    def _end_epoch(self, metrics: dict) -> None:
        """Record the metrics of the present epoch, save best.pt if it is the best, and go on to the next."""
        state, run, epoch = self.state, self.run, metrics["epoch"]
        improved = metrics["video_top1"] > state.best["video_top1"]
        if improved:
            state.best = {"epoch": epoch, "video_top1": metrics["video_top1"]}
        # The state after this epoch is the one that a resumed run starts the next epoch with.
        state.position = TrainPosition(epoch + 1)
        metrics["peak_memory_bytes"] = peak_memory_bytes(state.runtime.device)
        state.runtime.from_main(run.add_metrics, metrics)
        measured = f", batch norm measured in {metrics['precise_bn_seconds']:.1f} s" if self.precise_bn else ""
        print(
            f"epoch {epoch + 1}/{self.epochs}: loss {metrics['train_loss']:.4f}, "
            f"train clip top-1 {metrics['train_clip_top1']:.1f} %, "
            f"{self.evaluated_on} clip {metrics['clip_top1']:.1f} %, video {metrics['video_top1']:.1f} %, "
            f"{metrics['clips_per_second']:.1f} clips/s, {100 * metrics['data_wait_share']:.0f} % waiting for data"
            f"{measured}",
            flush=True,
        )
        if improved:
            state.save(run.best)

    def _is_due(self) -> bool:
        """Whether a checkpoint in mid-epoch is due."""
        seconds = 60 * self.checkpoint_minutes
        return seconds > 0 and time.monotonic() - self._saved_at >= seconds

    def _save(self) -> None:
        lines = self._unreadable.take() + self._unreadable_in_test.take()
        self.state.runtime.from_main(self.run.add_to_list, "broken.txt", lines)
        self.state.save(self.run.last, self.keep)
        self._saved_at = time.monotonic()

    def _with_advice(self, error: UserError) -> UserError:
        """The error to leave with, after saving what is good."""
        state, run = self.state, self.run
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
            self._save()
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
