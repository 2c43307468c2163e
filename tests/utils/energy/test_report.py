"""Energy at the published size, of constants that make it easy, and beside that of other networks."""

import functools
import json

import pytest
import torch

from models import ReSpike
from utils.energy.memory import count_memory
from utils.energy.operations import count_operations
from utils.energy.report import Constants, baselines, energy_report
from utils.energy.spikes import assumed_spikes


@functools.cache
def counted() -> tuple[ReSpike, dict, dict, dict]:
    with torch.device("meta"):
        model = ReSpike("resnet50", 51, stride=4, downsample=True)
    shape = (model, 16, 224)
    return model, count_operations(*shape), count_memory(*shape), baselines(*shape, num_classes=51)


def published(rate=0.1) -> dict:
    """Of ResNet-50, stride 4, downsample."""
    model, counts, memory, others = counted()
    return energy_report(counts, assumed_spikes(model, 16, 224, rate), memory=memory, others=others)


def test_energy_of_the_published_size():
    report = published()
    parts = report["parts"]
    assert len(parts) == 18
    assert parts["spiking_convs"]["mj"] == pytest.approx(1.7, abs=0.05)
    assert report["total_mj"] == pytest.approx(121, abs=0.5) == sum(part["mj"] for part in parts.values())
    assert sum(part["mj"] for row, part in parts.items() if row.startswith("fusion")) == pytest.approx(41, abs=0.5)
    assert parts["resnet"]["mj"] == pytest.approx(75, abs=0.5)
    times = {name: other["mj"] / report["total_mj"] for name, other in report["baselines"].items()}
    assert times["resnet50_all_frames"] == pytest.approx(2.5, abs=0.05)
    assert times["r2plus1d_18_224"] == pytest.approx(6.15, abs=0.005)
    assert times["r2plus1d_18_112"] == pytest.approx(1.5, abs=0.05)
    want = counted()[1]
    assert report["baselines"]["respike_relu"]["macs"] == want["total.macs"] + want["snn.spiking_convs.dense"]
    relu_memory = Constants().memory_mj(count_memory(counted()[0], 16, 224, spiking=False))["total"]
    assert report["baselines"]["respike_relu"]["memory_mj"] == relu_memory < report["memory"]["mj"]["total"]
    assert parts["neuron_updates"]["mj"] == pytest.approx(5.5e-9 * want["snn.lif_neuron_steps"])
    assert report["spikes"]["rate_x_dense_mj"] == pytest.approx(0.09e-9 * want["snn.spiking_convs.dense"])
    macs = sum(part["operations"] for part in parts.values() if part["kind"] == "mac")
    assert macs == want["total.macs"]
    assert json.loads(json.dumps(report)) == report


def test_at_the_break_even_rate_both_cost_the_same():
    report = published()
    even = {name: rate for name, rate in report["break_even_rate"].items() if rate is not None}
    assert even == {"resnet18_all_frames": pytest.approx(0.834, abs=5e-4)}
    at_even = published(even["resnet18_all_frames"])
    assert at_even["total_mj"] == pytest.approx(report["baselines"]["resnet18_all_frames"]["mj"])


def test_constants_scale_the_energy():
    counts = {"ann.stem": 10**9, "snn.lif_neuron_steps": 10**9, "snn.spiking_convs.dense_existing": 4 * 10**9}
    spikes = {
        "clips": 2,
        "mean": 2e9,
        "std": 1e9,
        "layers": {"one": {"mean": 2e9, "std": 1e9, "rate": 0.5, "dense": 5e9}},
    }
    report = energy_report(
        counts, spikes, Constants(mac_pj=3.0, ac_pj=0.5), others={"a": {"mj": 8.0}, "b": {"mj": 9.0}}
    )
    assert {row: part["mj"] for row, part in report["parts"].items()} == pytest.approx(
        {"resnet": 3.0, "spiking_convs": 1.0, "neuron_updates": 3.5}
    )
    assert report["total_mj"] == pytest.approx(7.5) and report["total_mj_std"] == pytest.approx(0.5)
    assert report["spikes"]["rate_x_dense_mj"] == pytest.approx(1.25)
    assert report["break_even_rate"] == {"a": pytest.approx(0.75), "b": None}
