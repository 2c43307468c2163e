"""What an epoch does, on a small network that is quick and smooth."""

import copy
import math

import pytest
import torch
from torch import nn

from dataset.video import EpochSampler, VideoBatch
from utils.device import choose_precision
from utils.engine import NonFiniteLossError, TrainPosition, cosine_with_warmup, evaluate, train_one_epoch

CPU = torch.device("cpu")


class Record:
    def __init__(self, path):
        self.path = path


class Clips(torch.utils.data.Dataset):
    """19 clips of noise whose label shows in their brightness."""

    def __init__(self, clips=19):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 3, (clips,), generator=generator)
        noise = torch.randint(0, 60, (clips, 4, 3, 8, 8), generator=generator)
        self.clips = (noise + 60 * self.labels[:, None, None, None, None]).to(torch.uint8)
        self.records = [Record(f"video{number}.avi") for number in range(clips)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        _, index = key
        return VideoBatch(self.clips[index], self.labels[index], torch.tensor(index))


def make_loader(batch_size=4, clips=19, shuffle=True):
    dataset = Clips(clips)
    return torch.utils.data.DataLoader(dataset, batch_size, sampler=EpochSampler(clips, shuffle, seed=0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(9, 3)

    def forward(self, key, residual):
        return self.layer(torch.cat([key.mean((1, 3, 4)), residual.std((1, 2, 4, 5)), residual.mean((1, 2, 4, 5))], 1))

    def lif_layers(self):
        return {}


def train(model, epochs=1, loader=None, position=None, lr=0.1, **more):
    loader = loader or make_loader()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    position = position or TrainPosition()
    result = None
    for _ in range(epochs):
        result = train_one_epoch(
            model, loader, optimizer, scaler, device=CPU, precision=None, stride=4, epochs=9, position=position, **more
        )
        position = TrainPosition(position.epoch + 1)
    return result


def test_training_learns_and_evaluation_agrees():
    model = Net()
    first = train(model)
    assert set(first) == {"train_loss", "train_clip_top1", "clips_per_second", "data_wait_share"}
    last = train(model, epochs=30)
    assert last["train_loss"] < 0.7 * first["train_loss"]
    scores = evaluate(model, make_loader(7, shuffle=False), 3, device=CPU, precision=None, stride=4, task="test")
    assert scores["clip_top1"] == scores["video_top1"] > 60 and scores["clip_top5"] == 100.0
    assert scores["videos"] == 19 and math.isfinite(scores["loss"])


def test_training_loss_is_the_mean_over_clips():
    model = Net()
    result = train(copy.deepcopy(model), lr=0.0)
    scores = evaluate(model, make_loader(shuffle=False), 3, device=CPU, precision=None, stride=4, task="test")
    assert result["train_loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert result["train_clip_top1"] == pytest.approx(scores["clip_top1"])


def test_accumulation_equals_the_larger_batch():
    """Two batches of 4 a step, against batches of 8, on 16 clips; the last group of an epoch included."""
    accumulated, whole = Net().double(), Net().double()
    for model, batch, steps in ((accumulated, 4, 2), (whole, 8, 1)):
        train(DoubleInput(model), epochs=2, loader=make_loader(batch, clips=16), accumulation_steps=steps)
    torch.testing.assert_close(accumulated.layer.weight, whole.layer.weight, rtol=1e-9, atol=1e-12)
    # 12 clips: a step over 8, then one over the 4 that are left, each a mean over what it has.
    short, explicit = Net().double(), Net().double()
    train(DoubleInput(short), loader=make_loader(4, clips=12), accumulation_steps=2)
    train(DoubleInput(explicit), loader=make_loader(8, clips=12))
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


@pytest.mark.parametrize("stop_after", [1, 2, 4])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_stopped_and_continued_is_undisturbed(stop_after, accumulation_steps):
    whole, parts = Net(), Net()
    want = train(whole, accumulation_steps=accumulation_steps)
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    position, calls = TrainPosition(), []

    def stop():
        calls.append(1)
        return len(calls) == stop_after

    passes = dict(device=CPU, precision=None, stride=4, epochs=9, accumulation_steps=accumulation_steps)
    got = train_one_epoch(parts, make_loader(), optimizer, scaler, position=position, should_stop=stop, **passes)
    if got is None:
        assert 0 < position.batches < 5 and position.batches % accumulation_steps == 0
        got = train_one_epoch(
            parts, make_loader(), optimizer, scaler, position=TrainPosition(**vars(position)), **passes
        )
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


def test_evaluation_can_be_stopped():
    assert (
        evaluate(Net(), make_loader(), 3, device=CPU, precision=None, stride=4, task="t", should_stop=lambda: True)
        is None
    )


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
