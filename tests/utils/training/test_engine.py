"""What an epoch does, on a small network that is quick and smooth."""

import copy
import math

import numpy
import pytest
import torch
from torch import nn

from dataset.batch_sampler import EvalBatchSampler, TrainBatchSampler
from dataset.clips import CLIP
from dataset.device_loader import DeviceLoader
from dataset.residual import key_residual_split
from dataset.video import FailedVideo, collate
from utils.device import choose_precision
from utils.errors import UserError
from utils.runtime import ALONE
from utils.training.engine import TrainPosition, evaluate, train_one_epoch
from utils.training.feed import UnreadableVideos
from utils.training.fit import cosine_with_warmup
from utils.training.metrics import NonFiniteLossError, StepLog

CPU = torch.device("cpu")


class Videos:
    def path(self, video):
        return f"video{video}.avi"

    def __len__(self):
        return 19


class Clips(torch.utils.data.Dataset):
    """19 clips of noise whose label shows in their brightness; those in `unreadable` fail."""

    def __init__(self, clips=19, unreadable=()):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 3, (clips,), generator=generator)
        noise = torch.randint(0, 60, (clips, 4, 3, 8, 8), generator=generator)
        self.noise = (noise + 60 * self.labels[:, None, None, None, None]).to(torch.uint8)
        self.clips = numpy.array([(number, 0, 0) for number in range(clips)], CLIP)
        self.videos = Videos()
        self.unreadable = unreadable

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        _, index = key
        if index in self.unreadable:
            return FailedVideo(index, f"video{index}.avi: gone")
        return self.noise[index], int(self.labels[index]), index


def make_loader(batch_size=4, clips=19, shuffle=True, unreadable=()):
    data = Clips(clips, unreadable)
    batches = TrainBatchSampler(clips, batch_size, seed=0) if shuffle else EvalBatchSampler(data.clips, batch_size)
    return DeviceLoader(torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=collate), 4, ALONE)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(9, 3)

    def forward(self, key, residual):
        return self.layer(torch.cat([key.mean((1, 3, 4)), residual.std((1, 2, 4, 5)), residual.mean((1, 2, 4, 5))], 1))

    def lif_layers(self):
        return {}


CRITERION = nn.CrossEntropyLoss()


def train(model, epochs=1, loader=None, position=None, lr=0.1, optimizer=None, criterion=CRITERION, **more):
    loader = loader or make_loader()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    position = position or TrainPosition()
    result = None
    for _ in range(epochs):
        result = train_one_epoch(model, loader, optimizer, scaler, criterion, position=position, **more)
        position = TrainPosition(position.epoch + 1)
    return result


def test_training_learns_and_evaluation_agrees():
    model = Net()
    first = train(model)
    assert set(first) == {"train_loss", "train_clip_top1", "train_clips", "clips_per_second", "data_wait_share"}
    last = train(model, epochs=30)
    assert last["train_loss"] < 0.7 * first["train_loss"]
    scores = evaluate(model, make_loader(7, shuffle=False))
    assert scores["clip_top1"] == scores["video_top1"] > 60 and scores["clip_top5"] == 100.0
    assert scores["counts"]["videos"] == scores["counts"]["clips"] == 19 and math.isfinite(scores["loss"])


def test_training_loss_is_the_mean_over_clips():
    model = Net()
    result = train(copy.deepcopy(model), lr=0.0)
    scores = evaluate(model, make_loader(shuffle=False))
    assert result["train_loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert result["train_clip_top1"] == pytest.approx(scores["clip_top1"])


def test_accumulation_equals_the_larger_batch():
    """Two batches of 4 a step, against batches of 8, on 16 clips; the last group of an epoch included."""
    accumulated, whole = Net().double(), Net().double()
    for model, batch, steps in ((accumulated, 4, 2), (whole, 8, 1)):
        train(DoubleInput(model), epochs=2, loader=make_loader(batch, clips=16), accumulation_steps=steps)
    torch.testing.assert_close(accumulated.layer.weight, whole.layer.weight, rtol=1e-9, atol=1e-12)
    # 19 clips: two steps over 8, then one over the 3 that are left, each a mean over what it has.
    short, explicit = Net().double(), Net().double()
    train(DoubleInput(short), loader=make_loader(4, clips=19), accumulation_steps=2)
    train(DoubleInput(explicit), loader=make_loader(8, clips=19))
    torch.testing.assert_close(short.layer.weight, explicit.layer.weight, rtol=1e-9, atol=1e-12)
    # 15: the second batch of the last step has 3 clips where the first has 4; each clip weighs the same.
    short, explicit = Net().double(), Net().double()
    train(DoubleInput(short), loader=make_loader(4, clips=15), accumulation_steps=2)
    train(DoubleInput(explicit), loader=make_loader(8, clips=15))
    torch.testing.assert_close(short.layer.weight, explicit.layer.weight, rtol=1e-9, atol=1e-12)


class DoubleInput(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, key, residual):
        return self.inner(key.double(), residual.double())


def test_clipping_bounds_the_step():
    model, before = Net(), Net()
    train(model, loader=make_loader(19), lr=1.0, clip_norm=0.01)
    change = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert change.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_stopped_and_continued_is_undisturbed(stop_after, accumulation_steps):
    whole, parts = Net(), Net()
    want = train(whole, accumulation_steps=accumulation_steps)
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1, momentum=0.9)
    position, calls = TrainPosition(), []

    def stop():
        calls.append(1)
        return len(calls) == stop_after

    more = dict(optimizer=optimizer, accumulation_steps=accumulation_steps)
    got = train(parts, position=position, should_stop=stop, **more)
    if got is None:
        assert position.clips < 19 and position.clips % (4 * accumulation_steps) == 0
        got = train(parts, position=TrainPosition(**vars(position)), **more)
    assert torch.equal(parts.layer.weight, whole.layer.weight)
    assert (got["train_loss"], got["train_clip_top1"]) == (want["train_loss"], want["train_clip_top1"])


def test_non_finite_loss_names_the_videos_and_takes_no_step():
    model = Net()
    with torch.no_grad():
        model.layer.bias.fill_(float("nan"))
    before = model.layer.weight.clone()
    with pytest.raises(NonFiniteLossError, match=r"nan; videos of that batch: video\d+\.avi, video\d+\.avi"):
        train(model)
    assert torch.equal(model.layer.weight, before)


def test_saving_between_steps():
    position, saved = TrainPosition(), []
    asked = iter([False, True, False, True, False])

    def save():
        saved.append((position.clips, position.sums[3].item()))

    train(Net(), position=position, should_save=lambda: next(asked), save=save)
    assert saved == [(4, 4.0), (12, 12.0)]  # clips done, clips counted


# ---- videos that cannot be read ---------------------------------------------------------------------


def test_unreadable_videos_are_left_out_of_the_mean_and_printed(capfd):
    """A step over what can be read of its batch; a batch of nothing is no step."""
    order = [clip for batch in order_of(4) for clip in batch]
    gone = set(order[4:8]) | {order[0]}  # the second batch whole, and one of the first
    model = Net()
    unreadable = UnreadableVideos()
    position = TrainPosition()
    train(model, loader=make_loader(unreadable=gone), position=position, unreadable=unreadable, lr=0.0)
    err = capfd.readouterr().err
    assert position.clips == 19 and position.sums[3] == 14
    assert err.count("warning: left out: video") == 5
    assert sorted(unreadable.take()) == sorted(f"video{clip}.avi: gone" for clip in gone) and unreadable.take() == []
    train(model, loader=make_loader(unreadable=gone), unreadable=unreadable, lr=0.0)
    assert capfd.readouterr().err == ""  # each is printed once


def order_of(batch_size):
    batches = TrainBatchSampler(19, batch_size, seed=0)
    return [[clip for _, clip in batch] for batch in batches]


def test_a_step_over_a_batch_that_lacks_a_video():
    """Equal to the step over the others alone."""
    first = order_of(4)[0]
    lacking, explicit = Net().double(), Net().double()
    loader = make_loader(unreadable=first[1:2])
    stop = iter([False, True])
    train(DoubleInput(lacking), loader=loader, should_stop=lambda: next(stop))
    others = [clip for clip in first if clip != first[1]]
    data = Clips()
    key, residual = key_residual_split(data.noise[others], 4)
    loss = nn.functional.cross_entropy(DoubleInput(explicit)(key, residual), data.labels[others])
    loss.backward()
    want = explicit.layer.weight - 0.1 * explicit.layer.weight.grad
    torch.testing.assert_close(lacking.layer.weight, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unreadable_batch", [0, 1])
def test_a_step_that_lacks_a_whole_batch_is_the_mean_of_the_other(unreadable_batch):
    """Two batches of 4 a step, one of them unreadable: the step is that over the readable batch alone, not half."""
    order = order_of(4)
    gone, there = order[unreadable_batch], order[1 - unreadable_batch]
    lacking, explicit = Net().double(), Net().double()
    stop = iter([False, True])
    train(
        DoubleInput(lacking), loader=make_loader(unreadable=gone), accumulation_steps=2, should_stop=lambda: next(stop)
    )
    data = Clips()
    key, residual = key_residual_split(data.noise[there], 4)
    nn.functional.cross_entropy(DoubleInput(explicit)(key, residual), data.labels[there]).backward()
    want = explicit.layer.weight - 0.1 * explicit.layer.weight.grad
    torch.testing.assert_close(lacking.layer.weight, want, rtol=1e-6, atol=1e-7)


def test_storage_that_is_gone_stops_the_run():
    position = TrainPosition()
    before = Net()
    model = copy.deepcopy(before)
    with pytest.raises(UserError, match=r"11 of 19 videos can no longer be read, the last: video\d+\.avi: gone"):
        train(model, loader=make_loader(1, unreadable=range(19)), position=position)
    assert torch.equal(model.layer.weight, before.layer.weight) and position.clips == 10


def test_many_clips_of_one_unreadable_video_are_one_video():
    unreadable, videos = UnreadableVideos(), Videos()
    for _ in range(3):
        unreadable.add([(4, f"video4.avi: frame {n} was wanted") for n in range(16)], videos)
    assert unreadable.take() == ["video4.avi: frame 0 was wanted"]


def test_evaluation_leaves_unreadable_videos_out():
    scores = evaluate(Net(), make_loader(shuffle=False, unreadable=(3, 8)))
    assert scores["counts"]["videos"] == scores["counts"]["clips"] == 17


def test_evaluation_can_be_stopped():
    assert evaluate(Net(), make_loader(shuffle=False), should_stop=lambda: True) is None


def test_the_criterion_is_the_callers():
    """Twice the loss at half the learning rate is the same step."""
    twice, once = Net(), Net()
    train(twice, lr=0.05, criterion=lambda logits, labels: 2 * CRITERION(logits, labels))
    train(once, lr=0.1)
    torch.testing.assert_close(twice.layer.weight, once.layer.weight)


def test_lines_within_an_epoch():
    """19 clips in batches of 4: steps 2 and 4 of 5 are due. The losses are means over the clips since the last."""
    lines, position = [], TrainPosition()
    log = StepLog(2, lambda values: lines.append({"clips": position.clips, **values}))
    whole = train(Net(), position=position, log=log, lr=0.0)
    assert [line["clips"] for line in lines] == [8, 16] and all(line["clips_per_second"] > 0 for line in lines)
    model = Net()
    for line, batches in zip(lines, (order_of(4)[:2], order_of(4)[2:4]), strict=True):
        clips = [clip for batch in batches for clip in batch]
        key, residual = key_residual_split(Clips().noise[clips], 4)
        want = CRITERION(model(key, residual), Clips().labels[clips]).item()
        assert line["train_loss"] == pytest.approx(want, rel=1e-6)
    assert whole["train_loss"] != lines[0]["train_loss"]


def test_learning_rate():
    assert [cosine_with_warmup(epoch, 100, 0) for epoch in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    assert [cosine_with_warmup(epoch, 12, 2) for epoch in (0, 1, 2, 7, 12)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0])
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(Net().parameters(), lr=1.0), T_max=10)
    for epoch in range(10):
        assert reference.get_last_lr()[0] == pytest.approx(cosine_with_warmup(epoch, 10, 0))
        reference.optimizer.step()
        reference.step()


def test_precision():
    assert choose_precision(CPU, amp=False) is None
    hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert choose_precision(CPU, amp=True) == (torch.bfloat16 if hardware else None)


def test_a_sample_is_as_a_full_batch():
    """What `GraphedNetwork` is recorded with."""
    loader = make_loader()
    batch, sample = loader.split(next(iter(loader))), loader.sample()
    for own, other in zip(sample, batch, strict=True):
        assert own.shape == other.shape and own.dtype == other.dtype
    assert sample.key.stride() == batch.key.stride() and sample.residual.stride() == batch.residual.stride()
    assert len(make_loader(unreadable={0, 1}).sample().labels) == 4
    with pytest.raises(UserError, match="none of the training clips"):
        make_loader(unreadable=range(19)).sample()
