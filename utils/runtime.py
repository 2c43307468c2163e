"""Where a run computes: the device, the precision, and the other processes of the run (ranks).

torchrun or Slurm starts one process for each GPU; without them there is one. Two groups of processes are
used. Gradients go through the default one (NCCL between GPUs). Everything else is small, lies on the CPU
and goes through `control` (gloo), which waits for days: another rank may still be indexing videos.
"""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.device import choose_device, choose_precision, device_name
from utils.errors import OtherProcessError, UserError

_CPU = torch.device("cpu")
_PATIENCE = timedelta(days=2)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Runtime:
    """This process among those of the run. All ranks call every method, in the same order."""

    device: torch.device = _CPU
    precision: torch.dtype | None = None  # of autocast; None computes in float32
    rank: int = 0
    count: int = 1  # processes of the run
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def precision_name(self) -> str:
        return str(self.precision or torch.float32).removeprefix("torch.")

    def described(self) -> dict:
        """For config.json."""
        return {"device": device_name(self.device), "precision": self.precision_name, "processes": self.count}

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None)

    def add(self, *counts: int) -> list[int]:
        """Each of `counts` summed over all ranks."""
        return self.sum(torch.tensor(counts, dtype=torch.int64)).tolist()

    def sum(self, values: Tensor) -> Tensor:
        """The `values` summed over all ranks, on the device of `values`."""
        if self.count == 1:
            return values
        total = values.detach().to("cpu", copy=True)
        dist.all_reduce(total, group=self.control)
        return total.to(values.device)

    def gather(self, items: list) -> list:
        """The items of all ranks, in the order of the ranks."""
        if self.count == 1:
            return items
        parts = [[] for _ in range(self.count)]
        dist.all_gather_object(parts, items, group=self.control)
        return [item for part in parts for item in part]

    def from_main(self, function: Callable[..., Result], *arguments, **more) -> Result:
        """Run `function` in rank 0 and give its result to all. A UserError there ends all ranks; it is printed
        once."""
        if self.count == 1:
            return function(*arguments, **more)
        outcome = [self.in_all(function, *arguments, **more) if self.is_main else self.in_all(lambda: None)]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        return outcome[0]

    def in_all(self, function: Callable[..., Result], *arguments, **more) -> Result:
        """Run `function` in every rank. A UserError in any rank ends all; the lowest such rank prints it."""
        if self.count == 1:
            return function(*arguments, **more)
        result = error = None
        try:
            result = function(*arguments, **more)
        except UserError as raised:
            error = raised
        failed = self.gather([error is not None])
        if any(failed):
            raise error if error is not None and failed.index(True) == self.rank else OtherProcessError
        return result

    def replicate(self, model: nn.Module, accumulates: bool = False) -> nn.Module:
        """The model to train with: its gradients become the mean over all ranks. Parameters and buffers start
        as those of rank 0. accumulates: some backward passes will be under `no_backward_sync`."""
        if self.count == 1:
            return model
        # Buffers are the running statistics of batch norm. Training does not read them, so they are not sent around
        # at every step, but by `share_buffers`. (Newer versions of PyTorch rename the option and warn of the old name.)
        options = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        self.share_buffers(model)
        # DDP's static graph needs a synchronised first backward pass; with gradient accumulation the first is not.
        return DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None, **{sync_buffers: False},
            gradient_as_bucket_view=True, static_graph=not accumulates,
        )  # fmt: skip

    def no_backward_sync(self, network: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
        """If `enabled`, backward passes inside add up gradients of this rank alone."""
        if enabled and isinstance(network, DistributedDataParallel):
            return network.no_sync()
        return contextlib.nullcontext()

    def share_buffers(self, model: nn.Module) -> None:
        """Every rank takes the buffers of rank 0, which are the ones that checkpoints hold."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


ALONE = Runtime()


def join_run(device: str, amp: bool) -> Runtime:
    """This process's device and precision, and the ranks of the run.

    device: "cuda", "cuda:N" or "cpu". amp: mixed precision, if the hardware has it. Only rank 0 keeps its stdout.
    Raises UserError as `launched` does, if the other ranks cannot be reached, or if the device is not there.
    """
    place = launched()
    if place is None:
        chosen = choose_device(device)
        return Runtime(chosen, choose_precision(chosen, amp))
    rank, count, local_rank, local_count = place
    chosen = error = None
    try:
        chosen = choose_device(device, local_rank, local_count)
    except UserError as raised:
        error = raised
    try:
        on_gpu = chosen is not None and chosen.type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as raised:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {count} processes of this run cannot meet at {address} ({str(raised).splitlines()[0]})"
        ) from raised
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    runtime = Runtime(chosen, None if chosen is None else choose_precision(chosen, amp), rank, count, control)
    runtime.in_all(_check_devices, runtime, error)
    return runtime


def _check_devices(runtime: Runtime, error: UserError | None) -> None:
    """Raise this rank's `error`, or a UserError if its device is of another type than that of rank 0."""
    own = None if runtime.device is None else runtime.device.type
    types = runtime.gather([own])
    if error is not None:
        raise error
    if own != types[0]:
        raise UserError(f"this process would run on {own}, rank 0 on {types[0]}; give --device for all")


# ---- the variables that a launcher sets -----------------------------------------------------------------


class Place(NamedTuple):
    """Of this process among those of its run."""

    rank: int
    count: int
    local_rank: int  # among those on this machine
    local_count: int


def launched() -> Place | None:
    """The place that a launcher gave this process: torchrun, or any that sets RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. None if WORLD_SIZE is not set or 1: this process is alone.

    Raises UserError if these variables make no sense.
    """
    count = _whole("WORLD_SIZE", 1)
    if count < 2:
        return None
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {count}, {', '.join(missing)} not set: start several processes with torchrun; "
            "for one process unset WORLD_SIZE"
        )
    place = Place(_whole("RANK", 0), count, _whole("LOCAL_RANK", 0), _whole("LOCAL_WORLD_SIZE", 1))
    if not (0 <= place.rank < count and 0 <= place.local_rank < place.local_count):
        found = ", ".join(f"{name} {os.environ[name]}" for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        raise UserError(f"WORLD_SIZE is {count} with {found}: start several processes with torchrun")
    return place


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text or default)
    except ValueError as error:
        raise UserError(f"{name} is {text!r} in the environment, expected a whole number; unset it") from error


def local_processes() -> int:
    """Processes of this run on this machine. Raises UserError as `launched` does."""
    place = launched()
    return 1 if place is None else place.local_count
