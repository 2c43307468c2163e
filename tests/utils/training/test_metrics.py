import math

import pytest
import torch

from models import ReSpike
from utils.training.metrics import ClipScores, FiringRates, VideoScores

CPU = torch.device("cpu")


def test_clip_scores_do_not_depend_on_the_batches():
    logits, labels = torch.randn(23, 9), torch.randint(0, 9, (23,))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    for size in (1, 4, 23):
        scores = ClipScores(CPU)
        for part in torch.arange(23).split(size):
            scores.add(logits[part], labels[part], losses[part].mean())
        result = ClipScores.result(scores.sums)
        assert result["top1"] == pytest.approx(100 * (ranks < 1).double().mean().item())
        assert result["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item())
        assert result["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)


def test_clip_scores_go_on_from_a_state():
    logits, labels = torch.randn(10, 4), torch.randint(0, 4, (10,))
    whole, first = ClipScores(CPU), ClipScores(CPU)
    for scores, parts in ((whole, (slice(0, 5), slice(5, 10))), (first, (slice(0, 5),))):
        for part in parts:
            scores.add(logits[part], labels[part], logits[part].mean())
    second = ClipScores(CPU, first.sums)
    second.add(logits[5:], labels[5:], logits[5:].mean())
    assert torch.equal(second.sums, whole.sums)


def test_fewer_than_five_classes():
    scores = ClipScores(CPU)
    scores.add(torch.eye(3), torch.tensor([0, 1, 0]), torch.tensor(0.5))
    counts = {"top1_hits": 2, "top5_hits": 3, "clips": 3}
    assert ClipScores.result(scores.sums) == {"loss": 0.5, "top1": pytest.approx(200 / 3), "top5": 100.0} | counts


def test_video_scores_average_the_softmax():
    """Two views: one sure of class 0, two unsure of class 1 add up to class 0 only as probabilities."""
    scores = VideoScores(3, CPU)
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.5], [0.0, 3.0], [0.0, 0.1]])
    scores.add(logits[:2], torch.tensor([0, 0]), torch.tensor([0, 0]))
    scores.add(logits[2:], torch.tensor([0, 1]), torch.tensor([1, 2]))
    counts = {"top1_hits": 2, "top5_hits": 3, "videos": 3}
    assert VideoScores.result(scores.sums()) == {"top1": pytest.approx(200 / 3), "top5": 100.0} | counts


def test_videos_without_a_clip_do_not_count():
    scores = VideoScores(5, CPU)
    scores.add(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([3]))
    result = VideoScores.result(scores.sums())
    assert result["top1"] == 100.0 and result["videos"] == 1
    assert math.isnan(VideoScores.result(VideoScores(5, CPU).sums())["top1"])


def test_scores_of_several_processes_add_up():
    """Videos dealt out to 3 processes: the sums of their sums are those of one."""
    logits, labels, videos = torch.randn(22, 4), torch.arange(11).repeat_interleave(2) % 4, torch.arange(22) // 2
    whole = VideoScores(11, CPU)
    whole.add(logits, labels, videos)
    sums = torch.zeros(3, dtype=torch.float64)
    for rank in range(3):
        own = videos % 3 == rank
        part = VideoScores(11, CPU)
        part.add(logits[own], labels[own], videos[own])
        sums += part.sums()
    assert torch.equal(sums, whole.sums()) and sums[2] == 11


def test_firing_rates_over_several_forwards():
    model = ReSpike(branches="snn", num_classes=3).eval()
    spikes = {}

    def keep(name):
        return lambda module, inputs, output: spikes.setdefault(name, []).append(output)

    layers = model.lif_layers()
    assert [len(stage) for stage in layers.values()] == [4, 4, 4, 4]
    for stage, stage_layers in layers.items():
        for layer in stage_layers:
            layer.register_forward_hook(keep(stage))
    key = torch.zeros(2, 1, 3, 32, 32)
    with torch.no_grad(), FiringRates(model) as rates:
        for batch in (2, 1):
            model(key[:batch], torch.randn(batch, 1, 3, 3, 32, 32) * 4)
    with torch.no_grad():
        model(key, torch.randn(2, 1, 3, 3, 32, 32))  # outside: not counted
    for stage, rate in rates.per_stage().items():
        counted = spikes[stage][:8]  # four layers, two forwards
        assert rate == pytest.approx(sum(s.sum().item() for s in counted) / sum(s.numel() for s in counted))
        assert 0 < rate < 1
    assert FiringRates(ReSpike(branches="ann")).per_stage() == {}


def test_firing_rates_of_a_compiled_model():
    """Switched on after compiling, and without a new trace for every batch."""
    model = ReSpike(branches="snn", num_classes=3).eval()
    batches = [(torch.zeros(2, 1, 3, 32, 32), torch.randn(2, 1, 3, 3, 32, 32) * 4) for _ in range(3)]
    results = []
    traces = []

    def counting_backend(graph, inputs):
        traces.append(graph)
        return graph.forward

    for compiled in (False, True):
        if compiled:
            model.compile(backend=counting_backend)
        with torch.no_grad():
            model(*batches[0])
            with FiringRates(model) as rates:
                for batch in batches:
                    model(*batch)
        results.append(rates.per_layer())
    assert results[0] == results[1] and max(results[0]) > 0.05
    assert len(traces) <= 2
