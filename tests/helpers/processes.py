"""Runs in several processes, for tests: tests/helpers/processes.py TASK ...

compute FOLDER OUT                   gradients, running statistics and test scores, to OUT/<number of processes>
run SCRIPT FLAGS ...                 a script
train LOG SCRIPT FLAGS ...           a training script that logs which videos it trains on
ranks COUNTS TASK ...                one of these in that many forked processes (1,2: in one, then in two). Less than
                                     torchrun does: signals and failures are not handed on. PyTorch is imported once.
"""

import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dataset.batch_sampler import EvalBatchSampler, TrainBatchSampler
from dataset.clips import NO_VIDEO, VideoTable, eval_clips, random_clips
from dataset.device_loader import DeviceLoader
from dataset.frame_sampling import SegmentSampling
from dataset.index import VideoInfo, probe
from dataset.splits import VideoRecord
from dataset.transforms import eval_transforms, multi_scale_crop
from dataset.video import VideoDataset, make_loader
from models import ReSpike
from models.batch_norm import BATCH_NORMS, FrameBatchNorm2d, StepBatchNorm2d, synchronise_batch_norm
from models.neurons import LIF
from tests.helpers.script import free_port
from utils.runtime import Runtime, join_run
from utils.training.engine import TrainPosition, evaluate, train_one_epoch
from utils.training.precise_bn import measure_statistics

SEGMENTS = SegmentSampling(4)


def table(folder: str, videos: int) -> VideoTable:
    paths = sorted(map(str, Path(folder).glob("*/*.avi")))
    records = [VideoRecord(paths[number % len(paths)], number % 8, "") for number in range(videos)]
    infos: dict[str, VideoInfo] = {}
    for path in paths[:videos]:
        infos[path] = probe(path)
    return VideoTable(records, [infos[record.path] for record in records])


class Double(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.double()

    def forward(self, key, residual):
        return self.model(key.double(), residual.double())


def compute(folder: str, out: str) -> None:
    runtime = join_run("cpu", amp=False)
    results = {"counts": count(folder, runtime), "measured": measured(folder, runtime)}
    if 8 % runtime.count == 0:
        for batch_norm in ("fixed", *BATCH_NORMS):
            results[batch_norm] = one_step(folder, runtime, 8 // runtime.count, 1, batch_norm)
        # With two batches a step; they have statistics of their own: only fixed ones can agree.
        results["accumulated"] = one_step(folder, runtime, 4 // runtime.count, 2, "fixed")
        # The second batch's videos are gone: all of them, or those of the second of two processes, which is
        # enough for the batch to be left out by both.
        gone = range(4, 8) if runtime.count == 1 else range(6, 8)
        results["empty batch"] = one_step(folder, runtime, 4 // runtime.count, 2, "fixed", gone)
        results["film"] = one_step(folder, runtime, 8 // runtime.count, 1, "fixed", fusion="film")
        results["fused"] = fused_batch_norm(runtime)
    if runtime.is_main:
        torch.save(results, Path(out) / str(runtime.count))


def one_step(
    folder: str, runtime: Runtime, batch_size: int, accumulate: int, batch_norm: str, gone: Sequence[int] = (),
    fusion: str = "cross",
) -> dict:  # fmt: skip
    """gone: places in the epoch's order whose videos are."""
    torch.manual_seed(3)
    mode = "per-step" if batch_norm == "fixed" else batch_norm
    model = ReSpike(num_classes=8, stride=2, snn_batch_norm=mode, fusion=fusion)
    if batch_norm == "fixed":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().train = lambda mode=True, module=module: module  # whatever the epoch sets
    else:
        synchronise_batch_norm(model)
    double = Double(model)
    videos = table(folder, 24)
    clips = random_clips(videos)
    (order,) = TrainBatchSampler(len(clips), len(clips), seed=0)
    for place in gone:
        clips["video"][order[place][1]] = NO_VIDEO
    data = VideoDataset(videos, clips, SEGMENTS, [multi_scale_crop(32, flip=False)], seed=0)
    batches = TrainBatchSampler(len(data), batch_size, seed=0, rank=runtime.rank, processes=runtime.count)
    # Steps of size one, without momentum, leave the gradient as the difference of the weights.
    before = {name: value.detach().clone() for name, value in double.named_parameters()}
    stop = iter([False, True])
    train_one_epoch(
        runtime.replicate(double, accumulates=accumulate > 1),
        DeviceLoader(make_loader(data, batches, 0, pin=False), 2, runtime),
        torch.optim.SGD(double.parameters(), lr=1.0), torch.amp.GradScaler("cpu", enabled=False),
        nn.CrossEntropyLoss(), runtime,
        position=TrainPosition(), accumulation_steps=accumulate, should_stop=lambda: next(stop),
    )  # fmt: skip
    gradients = {name: before[name] - value.detach() for name, value in double.named_parameters()}
    return {"gradients": gradients, "buffers": dict(double.named_buffers())}


def measured(folder: str, runtime: Runtime) -> dict:
    """Statistics of 24 clips in two batches of all ranks, in each mode."""
    found = {}
    for mode in BATCH_NORMS:
        torch.manual_seed(3)
        double = Double(ReSpike(num_classes=8, stride=4, snn_batch_norm=mode))
        videos = table(folder, 24)
        data = VideoDataset(videos, random_clips(videos), SEGMENTS, [multi_scale_crop(32, flip=False)], seed=0)
        batches = TrainBatchSampler(len(data), 12 // runtime.count, 0, runtime.rank, runtime.count)
        loader = DeviceLoader(make_loader(data, batches, 0, pin=False), 4, runtime)
        assert measure_statistics(double, loader, runtime, epoch=1, clips=24)["precise_bn_clips"] == 24
        found |= {f"{mode} {name}": value for name, value in double.named_buffers()}
    return found


def fused_batch_norm(runtime: Runtime) -> dict:
    """Synchronised batch norm with neurons behind it on the fused kernels (in Triton's interpreter) in each mode:
    gradients and running statistics."""
    found = {}
    for mode in BATCH_NORMS:
        torch.manual_seed(7)
        norm = StepBatchNorm2d(5, mode, backend="triton", steps=3).double().train()
        synchronise_batch_norm(norm)
        x = torch.randn(3, 8, 5, 4, 4, dtype=torch.float64)
        weights = torch.randn_like(x)
        own = slice(runtime.rank * 8 // runtime.count, (runtime.rank + 1) * 8 // runtime.count)
        inputs = x[:, own].clone().requires_grad_()
        total, spikes = norm(inputs, neuron=LIF(backend="triton"))
        (total * weights[:, own] + spikes * weights[:, own]).sum().backward()
        whole = torch.zeros_like(x)
        whole[:, own] = inputs.grad
        for value in (whole, norm.weight.grad, norm.bias.grad):
            dist.all_reduce(value) if runtime.count > 1 else None
        found |= {f"{mode} {name}": value for name, value in norm.named_buffers()}
        found |= {f"{mode} x": whole, f"{mode} weight": norm.weight.grad, f"{mode} bias": norm.bias.grad}
    norm = FrameBatchNorm2d(5, backend="triton").double().train()
    synchronise_batch_norm(norm)
    inputs, residual = x[0, own].clone().requires_grad_(), x[1, own]
    (norm(inputs, residual, relu=True) * weights[0, own]).sum().backward()
    whole = torch.zeros_like(x[0])
    whole[own] = inputs.grad
    dist.all_reduce(whole) if runtime.count > 1 else None
    found |= {"frames x": whole} | {f"frames {name}": value for name, value in norm.named_buffers()}
    return {"gradients": found, "buffers": {}}


def count(folder: str, runtime: Runtime) -> list[dict]:
    torch.manual_seed(5)
    model = ReSpike(num_classes=8, stride=2)
    for name, buffer in model.named_buffers():  # so that the classes differ from video to video
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
    results = []
    for videos in (table(folder, 7), table(folder, 37)):
        views = SegmentSampling(4, views=2)
        data = VideoDataset(videos, eval_clips(videos, views), views, eval_transforms(32, 36), seed=0)
        batches = EvalBatchSampler(data.clips, 4, runtime.rank, runtime.count)
        loader = DeviceLoader(make_loader(data, batches, 0, pin=False), 2, runtime)
        results.append(evaluate(model, loader, runtime)["counts"])
    return results


def run(script: str, *flags: str) -> None:
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def train(log: str, script: str, *flags: str) -> None:
    log_videos(log, setattr)
    run(script, *flags)


def log_videos(log: str | Path, setattr: Callable) -> None:
    """From here on lines (epoch, clips done, videos) go to `log`.<rank> for each batch that is trained on."""
    import utils.training.fit
    import utils.training.metrics

    at = {}
    epoch, add = utils.training.fit.train_one_epoch, utils.training.metrics.LossWatch.add

    def remembering(*arguments, position, **more):
        at["position"] = position
        return epoch(*arguments, position=position, **more)

    def logging(watch, loss, videos):
        with open(f"{log}.{os.environ.get('RANK', '0')}", "a") as file:
            file.write(json.dumps([at["position"].epoch, at["position"].clips, videos.tolist()]) + "\n")
        add(watch, loss, videos)

    setattr(utils.training.fit, "train_one_epoch", remembering)
    setattr(utils.training.metrics.LossWatch, "add", logging)


def ranks(counts: str, task: str, *arguments: str) -> None:
    def rank(number: int, count: int, port: int) -> None:
        about = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **{k: str(v) for k, v in about.items()}}
        torch.set_num_threads(1)
        TASKS[task](*arguments)

    fork = multiprocessing.get_context("fork")
    for count in map(int, counts.split(",")):
        port = free_port()
        processes = [fork.Process(target=rank, args=(number, count, port)) for number in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)


TASKS = {"compute": compute, "run": run, "train": train, "ranks": ranks}

if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    TASKS[task](*arguments)
