"""The processes of one run: torchrun's or Slurm's, one for each GPU, or just this one.

Two groups of them talk. Gradients go through the default one (NCCL between GPUs). Everything else is
small, lies on the CPU and goes through `control` (gloo), where waiting long for one that still indexes
videos or waits for a disk is no error.
"""

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

from utils.device import choose_device
from utils.errors import OtherProcessError, UserError

_PATIENCE = timedelta(days=2)
Result = TypeVar("Result")


class Agreement(NamedTuple):
    """What all processes know after telling each other."""

    stop: bool  # one was asked to stop
    save: bool  # one finds that a checkpoint is due
    failed: bool  # one cannot go on
    empty: bool  # one has no clip in its batch
    clips: int  # in all batches together


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Every method is called by all of them, in the same order."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def agree(self, *, stop: bool = False, save: bool = False, failed: bool = False, clips: int = 1) -> Agreement:
        told = [stop, save, failed, clips == 0, clips]
        if self.count > 1:
            sums = torch.tensor(told, dtype=torch.int64)
            dist.all_reduce(sums, group=self.control)
            told = sums.tolist()
        return Agreement(*(bool(value) for value in told[:4]), told[4])

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's float64 `values`, on their device."""
        if self.count == 1:
            return values
        total = values.detach().to("cpu", copy=True)
        dist.all_reduce(total, group=self.control)
        return total.to(values.device)

    def from_main(self, function: Callable[[], Result]) -> Result:
        """Run `function` in the main process and give its result to all. Its UserError ends all of them;
        only the main process speaks of it."""
        if self.count == 1:
            return function()
        outcome, error = [None, False], None
        if self.is_main:
            try:
                outcome[0] = function()
            except UserError as raised:
                outcome[1], error = True, raised
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if error is not None:
            raise error
        if outcome[1]:
            raise OtherProcessError
        return outcome[0]

    def together(self, function: Callable[[], Result]) -> Result:
        """Run `function` in every process. A UserError in some ends all; the first of them speaks."""
        result = error = None
        try:
            result = function()
        except UserError as raised:
            error = raised
        if self.count == 1:
            if error is not None:
                raise error
            return result
        failed = [False] * self.count
        dist.all_gather_object(failed, error is not None, group=self.control)
        if any(failed):
            raise error if error is not None and failed.index(True) == self.rank else OtherProcessError
        return result

    def gather(self, lines: list[str]) -> list[str]:
        """The lines of all processes, in the main one; elsewhere an empty list."""
        if self.count == 1:
            return lines
        parts = [[] for _ in range(self.count)] if self.is_main else None
        dist.gather_object(lines, parts, dst=0, group=self.control)
        return [line for part in parts for line in part] if self.is_main else []

    def replicate(self, model: nn.Module, device: torch.device, accumulates: bool = False) -> nn.Module:
        """The model to train with: gradients become the mean over all processes. Parameters and buffers
        start as the main process's. accumulates: some backward passes will be under `no_sync`."""
        if self.count == 1:
            return model
        # Buffers are batch norm's running statistics: training does not read them, so they are not sent
        # around at every step; `share_buffers` does before they are used.
        # (Newer versions of PyTorch rename the option, and warn of the old name.)
        options = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        self.share_buffers(model)
        # A static graph must be seen synchronised first, which an accumulated step does not begin with.
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, **{sync_buffers: False},
            gradient_as_bucket_view=True, static_graph=not accumulates,
        )  # fmt: skip

    def share_buffers(self, model: nn.Module) -> None:
        """Every process takes the main one's buffers: the ones that its checkpoints hold."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def mean_gradients(self, model: nn.Module) -> None:
        """What `replicate` does in the backward pass, for gradients that were made without."""
        if self.count > 1:
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.count


ALONE = Processes()


def join_processes(device_name: str) -> tuple[torch.device, Processes]:
    """(this process's device, the processes of the run).

    Those are the ones that torchrun started, or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; this one alone where WORLD_SIZE is not set. Only the main
    one keeps its stdout. Raises UserError where these make no sense, the others cannot be reached, or
    the device is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        device = choose_device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device, ALONE
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, {', '.join(missing)} not: start several processes with torchrun")
    rank, count, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = error = None
    try:
        device = choose_device(device_name, local_rank, local_processes())
    except UserError as raised:
        error = raised
    try:
        on_gpu = device is not None and device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as raised:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {count} processes of this run cannot meet at {address} ({str(raised).splitlines()[0]})"
        ) from raised
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    processes = Processes(rank, count, local_rank, control)
    processes.together(lambda: _same_everywhere(device, error, processes))
    return device, processes


def _same_everywhere(device: torch.device | None, error: UserError | None, processes: Processes) -> None:
    """Raise this process's `error`, or a UserError where its device is not of the main process's type."""
    types = [None] * processes.count
    dist.all_gather_object(types, device.type if device is not None else None, group=processes.control)
    if error is not None:
        raise error
    if device.type != types[0]:
        raise UserError(f"this process would run on {device.type}, the first on {types[0]}; give --device for all")


def local_processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
