"""Training and testing of heads on sequences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.memory_task import SHOWN, STEPS, SYMBOLS, delayed_recall
from models.heads.lmu import LMUHead
from models.heads.neurons import LIF, Izhikevich, LIFRate, RectifiedLinear, SpikingRectifiedLinear
from utils.errors import UserError
from utils.heads.batches import minibatches
from utils.heads.engine import evaluate, neurons_of, sequence_loss, train_epoch

pytestmark = pytest.mark.usefixtures("one_thread")


class Head(nn.Module):
    """Inputs [T, B, 3] -> logits. `seen` lists the neurons it had in each call."""

    def __init__(self, neuron=None):
        super().__init__()
        self.neuron, self.seen = neuron, []
        self.readout = nn.Linear(3, 3)

    def forward(self, inputs):
        self.seen.append(self.neuron)
        return self.readout(inputs)


def showing_labels(count: int, seed: int = 0):
    """Inputs that show their label at every step."""
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
    return F.one_hot(labels, 3).float().expand(4, -1, -1) * 2, labels


def epoch(head, batches, learning_rate=0.1, train_mode="spiking", loss="last", **more):
    optimizer = torch.optim.SGD(head.parameters(), learning_rate)
    with neurons_of(head, train_mode):
        return train_epoch(head, batches, optimizer, task="epoch 1/2", steps=len(batches), loss=loss, **more)


# ---- neurons -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "mode", "inside"),
    [
        (SpikingRectifiedLinear(), "rate", RectifiedLinear()),
        (LIF(), "rate", LIFRate()),
        (LIFRate(), "rate", LIFRate()),
        (None, "rate", None),
        (LIF(), "spiking", LIF()),
    ],
)
def test_neurons_of(own, mode, inside):
    head = Head(own)
    with neurons_of(head, mode):
        assert head.neuron == inside
    assert head.neuron is own
    with pytest.raises(KeyboardInterrupt), neurons_of(head, mode):
        raise KeyboardInterrupt
    assert head.neuron is own


def test_neurons_without_a_rate():
    head = Head(Izhikevich())
    with pytest.raises(UserError, match=r"Izhikevich.*train_mode spiking"), neurons_of(head, "rate"):
        pass
    assert head.neuron == Izhikevich()


def test_an_epoch_trains_with_rates_and_tests_with_spikes():
    head = Head(SpikingRectifiedLinear())
    inputs, labels = showing_labels(6)
    epoch(head, [(inputs, labels)], train_mode="rate")
    evaluate(head, [(inputs, labels)], torch.arange(6))
    assert head.seen == [RectifiedLinear(), SpikingRectifiedLinear()]


# ---- loss ----------------------------------------------------------------------------------------------


def test_sequence_loss_by_hand():
    """Two steps, two clips; odds of 3 to 1 for the second class, then for the first."""
    odds = math.log(3)
    logits = torch.tensor([[[0.0, odds], [0.0, odds]], [[odds, 0.0], [odds, 0.0]]])
    labels = torch.tensor([0, 1])
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    assert sequence_loss(logits, labels, "last").item() == pytest.approx((right + wrong) / 2)
    assert sequence_loss(logits, torch.tensor([0, 0]), "last").item() == pytest.approx(right)
    assert sequence_loss(logits, torch.tensor([0, 0]), "every").item() == pytest.approx((right + wrong) / 2)
    logits[0] = 0.0
    logits[:, 1] *= 2  # 9 to 1 at the last step
    want = (2 * math.log(2) + right - math.log(1 / 10)) / 4
    assert sequence_loss(logits, labels, "every").item() == pytest.approx(want)


# ---- an epoch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["last", "every"])
def test_epochs_lower_the_loss(loss):
    head = Head()
    inputs, labels = showing_labels(30)
    batches = [(inputs[:, part], labels[part]) for part in minibatches(30, 8, 1, 0)]
    results = [epoch(head, batches, learning_rate=0.5, loss=loss) for _ in range(6)]
    losses = [result["train_loss"] for result in results]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
    assert results[-1]["train_last_step"] == 100


def test_figures_of_an_epoch_are_those_of_its_clips():
    """A smaller last minibatch counts by its clips. With learning rate 0 the figures are those of the whole set."""
    head = Head()
    inputs, labels = showing_labels(10)
    batches = [(inputs[:, part], labels[part]) for part in minibatches(10, 4, 1, None)]
    found = epoch(head, batches, learning_rate=0.0)
    logits = head(inputs)
    assert found["train_loss"] == pytest.approx(sequence_loss(logits, labels, "last").item())
    assert found["train_last_step"] == pytest.approx(100 * (logits[-1].argmax(-1) == labels).double().mean().item())


def test_an_epoch_that_is_stopped():
    head = Head(LIF())
    inputs, labels = showing_labels(4)
    asked = iter([False, True])
    assert epoch(head, [(inputs, labels)] * 3, should_stop=lambda: next(asked), train_mode="rate") is None
    assert head.seen == [LIFRate()] and head.neuron == LIF()


def test_a_loss_that_is_not_finite():
    head = Head(LIF())
    inputs, labels = showing_labels(4)
    with pytest.raises(UserError, match="epoch 1/2: the loss became nan; take a smaller learning_rate") as caught:
        epoch(head, [(inputs * math.nan, labels)], train_mode="rate")
    assert "\n" not in str(caught.value) and head.neuron == LIF()


def test_lmu_learns_the_delayed_recall():
    """The clips of benchmarks/memory_task.py are as documented, and a head's loss on them falls."""
    inputs, labels = delayed_recall(64, seed=1)
    assert inputs.shape == (STEPS, 64, SYMBOLS) and torch.equal(inputs, delayed_recall(64, 1)[0])
    assert torch.equal(inputs[:SHOWN], F.one_hot(labels, SYMBOLS).float().expand(SHOWN, -1, -1))
    assert inputs[SHOWN:].std().item() == pytest.approx(0.5, abs=0.02)
    head = LMUHead(SYMBOLS, SYMBOLS, units=32, order=6, theta=STEPS, memory=4)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    batches = [(inputs[:, :32], labels[:32]), (inputs[:, 32:], labels[32:])]
    results = [train_epoch(head, batches, optimizer, task="", steps=2, loss="last") for _ in range(15)]
    assert results[-1]["train_loss"] < 0.5 * results[0]["train_loss"]


# ---- a test pass ---------------------------------------------------------------------------------------


def hand_made():
    """(batches, videos): three videos of two clips, two steps, three classes.

    At the last step: video 0 (class 0) has one clip surely right and one barely wrong; video 1 (class 1) both
    barely right; video 2 (class 2) one barely right and one surely wrong.
    """
    last = torch.tensor([[9.0, 0, 0], [0, 0.5, 0], [0, 0.5, 0], [0, 0.5, 0], [0, 0, 0.5], [9.0, 0, 0]])  # clip by clip
    first = torch.tensor([[0.0, 0, 1]]).expand(6, 3)  # class 2 for all
    logits, labels = torch.stack([first, last]), torch.tensor([0, 0, 1, 1, 2, 2])
    return [(logits[:, :4], labels[:4]), (logits[:, 4:], labels[4:])], torch.tensor([0, 0, 1, 1, 2, 2])


def test_accuracies_by_hand():
    batches, videos = hand_made()
    found = evaluate(nn.Identity(), batches, videos)
    assert found["per_step"] == [pytest.approx(100 / 3), pytest.approx(400 / 6)]
    assert found["last_step"] == found["per_step"][-1]
    assert found["video"] == pytest.approx(200 / 3) and found["counts"] == {"clips": 6, "videos": 3}
    logits, labels = (torch.cat(parts, dim) for parts, dim in zip(zip(*batches, strict=True), (1, 0), strict=True))
    assert found["loss"] == pytest.approx(F.cross_entropy(logits[-1], labels).item())


def test_video_accuracy_is_not_clip_accuracy():
    """One confident clip outweighs two unsure ones: probabilities are averaged, votes are not counted."""
    logits = torch.tensor([[[3.0, 0], [0, 0.2], [0, 0.2]]])
    found = evaluate(nn.Identity(), [(logits, torch.zeros(3, dtype=torch.int64))], torch.tensor([7, 7, 7]))
    assert found["last_step"] == pytest.approx(100 / 3) and found["video"] == 100
    assert found["counts"] == {"clips": 3, "videos": 1}


def test_probabilities_are_averaged_not_logits():
    logits = torch.tensor([[[20.0, 0], [0, 1.5], [0, 1.5]]])  # mean of softmax: class 1; sum of logits: class 0
    found = evaluate(nn.Identity(), [(logits, torch.ones(3, dtype=torch.int64))], torch.zeros(3))
    assert found["video"] == 100


def test_a_test_pass_keeps_no_graph():
    head = Head()
    inputs, labels = showing_labels(4)

    def check(*_):
        assert not torch.is_grad_enabled() and not head.training

    with head.register_forward_pre_hook(check):
        evaluate(head, [(inputs, labels)], torch.arange(4))
