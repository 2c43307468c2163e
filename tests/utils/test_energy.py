"""Counts against independent ones of all published sizes, spikes against loops over spikes and kernel taps."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataset.residual import key_residual_split
from models import ReSpike
from models.attention import Attention
from models.batch_norm import StepBatchNorm2d
from models.neurons import LIF, NEURONS
from tests.helpers.fake_gpu import fake_gpu
from tests.helpers.spikingjelly import skip_without_spikingjelly
from utils import energy
from utils.energy import (
    Constants,
    SpikeMeter,
    assumed_spikes,
    baselines,
    count_memory,
    count_operations,
    energy_report,
    format_report,
    spike_statistics,
    spiking_conv_layers,
)
from utils.errors import UserError
from utils.runtime import ALONE

OPS = json.loads((Path(__file__).parents[1] / "golden" / "ops.json").read_text())

# ---- dense counts


def configured(name: str) -> tuple[nn.Module, int, int]:
    """(network, frames, size) of a configuration of ops.json."""
    words = name.split("_")
    with torch.device("meta"):
        if words[0] == "respike":
            stride = int(words[3].removeprefix("stride"))
            return ReSpike(words[1], 51, stride, downsample=words[-1] == "downsample"), 16, 224
        if words[0].startswith("resnet"):
            stride = re.search(r"stride(\d)", name)
            return torchvision.models.get_model(words[0], num_classes=51), 16 // int(stride[1]) if stride else 16, 224
        network, _, clip = name.rpartition("_")
        return torchvision.models.get_model(network, num_classes=51), *map(int, clip.split("x"))


@pytest.mark.parametrize("name", OPS)
def test_agrees_with_independent_counts(name):
    want = dict(OPS[name])
    layers = want.pop("spiking_conv_layers", None)
    network, frames, size = configured(name)
    assert count_operations(network, frames, size) == want
    if layers is not None:
        assert spiking_conv_layers(network, frames, size) == layers


@pytest.mark.parametrize(
    "branches, fusion, parts",
    [("both", "concat", {"ann", "snn"}), ("ann", "cross", {"ann"}), ("snn", "cross", {"snn"})],
)
def test_ablations_have_the_counts_of_what_is_left(branches, fusion, parts):
    want = OPS["respike_resnet18_T16_stride4_224_downsample"]
    counts = count_operations(ReSpike(branches=branches, fusion=fusion), 16, 224)
    kept = {part: count for part, count in counts.items() if part.split(".")[0] in ("ann", "snn", "fusion") and count}
    assert kept == {part: count for part, count in want.items() if part.split(".")[0] in parts}
    assert counts["total.fusion"] == counts["published_code_adds.cross_kv"] == counts["other.fusion_adds"] == 0
    macs = counts["total.ann"] + counts.get("snn.stem", 0) + counts["total.snn_shortcuts"] + counts["head"]
    assert counts["total.macs"] == macs


class OtherFusion(nn.Module):
    """Attends without calling a module, and has parts of its own."""

    def __init__(self, channels, ann_channels):
        super().__init__()
        self.squeeze = nn.Linear(channels, 32)
        self.attend_ann = Attention(32, ann_channels)
        self.expand = nn.Linear(32, channels)

    def forward(self, snn, ann):
        tokens = self.squeeze(snn.sum(0).flatten(2).transpose(1, 2))
        tokens = self.attend_ann.forward(tokens, ann.flatten(2).transpose(1, 2))
        return snn + self.expand(tokens).transpose(1, 2).unflatten(2, snn.shape[3:])


def test_another_fusion_block_is_counted_by_the_names_of_its_modules():
    model = ReSpike(num_classes=5)
    model.fusions[1] = OtherFusion(128, 128)
    counts = count_operations(model, 8, 64)  # 2 key frames; 8 x 8 tokens at stage 2
    tokens = 2 * 64
    assert {part: count for part, count in counts.items() if part.startswith("fusion.stage2")} == {
        "fusion.stage2.squeeze": tokens * 128 * 32,
        "fusion.stage2.cross_q": tokens * 32 * 32,
        "fusion.stage2.cross_kv": 2 * tokens * 128 * 32,
        "fusion.stage2.cross_qk": tokens * 64 * 32,
        "fusion.stage2.cross_av": tokens * 64 * 32,
        "fusion.stage2.cross_out": tokens * 32 * 32,
        "fusion.stage2.expand": tokens * 128 * 32,
    }
    repeated = sum(counts[f"fusion.stage{stage}.cross_kv"] for stage in (1, 3, 4))
    assert counts["published_code_adds.cross_kv"] == 2 * repeated


class ProductWithWeights(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, classes))

    def forward(self, x):
        return x @ self.weight


class Transposed(nn.ConvTranspose2d):
    def __init__(self):
        super().__init__(512, 512, 1)


def attention_by_hand(self, query, context):
    weights = torch.softmax(self.to_q(query) @ self.to_k(context).transpose(1, 2), dim=-1)
    return self.to_out(weights @ self.to_v(context))


def test_what_is_left_uncounted_is_an_error(monkeypatch):
    model = ReSpike(num_classes=5)
    model.head = ProductWithWeights(1024, 5)
    with pytest.raises(RuntimeError, match=r"uncounted, by FlopCounterMode: ReSpike\.head: 0 MACs of 10240$"):
        count_operations(model, 8, 64)
    model = ReSpike(num_classes=5)
    model.ann.stages[3].append(Transposed())
    with pytest.raises(RuntimeError, match=r"ReSpike\.ann\.stages\.3\.2: 0 MACs of"):
        count_operations(model, 8, 64)
    monkeypatch.setattr(Attention, "forward", attention_by_hand)
    with pytest.raises(RuntimeError, match=r"ReSpike\.fusions\.0\.attend_self: \d+ MACs of \d+; "):
        count_operations(ReSpike(num_classes=5), 8, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "spikingjelly"])
def test_a_count_changes_nothing(backend, dtype):
    """A backend that cannot run on shapes does not matter, nor do inference mode and compilation."""
    model = ReSpike(num_classes=5, lif_backend=backend, pack_spikes=True).to(dtype)
    before = {name: (value.data_ptr(), value._version) for name, value in model.state_dict(keep_vars=True).items()}
    want = count_operations(ReSpike(num_classes=5), 8, 64)
    with torch.inference_mode():
        assert count_operations(torch.compile(model, backend="eager"), 8, 64) == want
    assert {n: (v.data_ptr(), v._version) for n, v in model.state_dict(keep_vars=True).items()} == before
    assert model.training and model.snn.stages[0][0].lif1.backend == backend


# ---- spikes


def network(backend="reference", stride=3, bias=0.7, **settings) -> ReSpike:
    """A small network in which a share of the neurons of every layer fires."""
    torch.manual_seed(3)
    model = ReSpike(num_classes=4, branches="snn", stride=stride, lif_backend=backend, **settings)
    for module in model.modules():
        if isinstance(module, StepBatchNorm2d):
            nn.init.normal_(module.weight, 2.5, 0.5)
            nn.init.normal_(module.bias, bias, 0.5)
    return model.eval()


def clips(batch=2, frames=6, stride=3, dtype=torch.float32):
    torch.manual_seed(4)
    return key_residual_split(torch.randn(batch, frames, 3, 32, 32).to(dtype), stride)


def counted_by_loops(model: ReSpike, key: torch.Tensor, residual: torch.Tensor) -> np.ndarray:
    """Accumulates [layers, B]: a loop over the spikes and, for each, over the nine taps of the kernel."""
    batch, key_frames = key.shape[:2]
    seen, handles = [], []
    for stage in model.snn.stages:
        for block in stage:
            for conv in (block.conv1, block.conv2):
                hook = lambda conv, inputs, out: seen.append((conv, inputs[0].float().numpy(), out.shape))  # noqa: E731
                handles.append(conv.register_forward_hook(hook))
    with torch.no_grad():
        model(key, residual)
    for handle in handles:
        handle.remove()
    accumulates = np.zeros((len(seen), batch), dtype=np.int64)
    for layer, (conv, spikes, (_, channels, height, width)) in enumerate(seen):
        stride = conv.stride[0]
        for image, _, y, x in np.argwhere(spikes):
            for tap_y in (-1, 0, 1):
                for tap_x in (-1, 0, 1):
                    out_y, rest_y = divmod(y + tap_y, stride)
                    out_x, rest_x = divmod(x + tap_x, stride)
                    if rest_y == rest_x == 0 and 0 <= out_y < height and 0 <= out_x < width:
                        clip = image % (batch * key_frames) // key_frames
                        accumulates[layer, clip] += channels
    assert (accumulates > 0).all() and len(seen) == 16
    return accumulates


def check(sums: torch.Tensor, want: np.ndarray) -> None:
    want = np.concatenate([want, want.sum(0, keepdims=True)])
    assert sums[:, 0].tolist() == [want.shape[1]] * 17
    assert sums[:, 1].tolist() == want.sum(1).tolist()
    assert sums[:, 2].tolist() == np.square(want).sum(1).tolist()


def metered(model, key, residual) -> torch.Tensor:
    with SpikeMeter(model) as meter:
        model(key=key, residual=residual)
    assert meter.clips == len(key)
    return meter.sums()


@functools.cache
def expected() -> np.ndarray:
    return counted_by_loops(network(), *clips())


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "spikingjelly", pytest.param("triton", marks=pytest.mark.kernels)])
def test_spikes_are_those_of_loops_over_kernel_taps(backend):
    """Convolutions of stride 1 and 2, borders included; a clip's are those of all its steps and key frames."""
    skip_without_spikingjelly(backend)
    check(metered(network(backend), *clips()), expected())


@pytest.mark.parametrize("stride", [2, 4])
def test_spikes_of_other_strides_and_of_both_branches(stride):
    torch.manual_seed(5)
    model = network(stride=stride)
    both = ReSpike(num_classes=4, stride=stride, lif_backend="reference").eval()
    both.snn = model.snn
    inputs = clips(frames=2 * stride, stride=stride)
    with torch.no_grad():
        check(metered(both, *inputs), counted_by_loops(both, *inputs))


def test_spikes_in_bfloat16_and_with_autocast():
    """More than 256 of 512 channels fire: a sum that bfloat16 cannot hold."""
    key, residual = clips(batch=1)
    model, inputs = network(bias=1.5).bfloat16(), (key.bfloat16(), residual.bfloat16())
    with torch.no_grad():
        check(metered(model, *inputs), counted_by_loops(model, *inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        check(metered(network(), key, residual), counted_by_loops(network(), key, residual))


def test_spikes_under_inference_mode_and_with_gradients():
    model = network()
    with torch.inference_mode(), SpikeMeter(model) as meter:
        model(*clips())
    with meter:
        model(*clips())  # outside inference mode
    check(meter.sums(), np.tile(expected(), 2))
    assert not model.head._forward_hooks and not model._forward_hooks and not model._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("in_place", [True, False])
def test_spikes_of_a_compiled_network(in_place):
    """Compiled code runs before and after the meter, not under it."""
    runs = []

    def backend(graph, inputs):
        return lambda *values: runs.append(1) or graph(*values)

    model = network()
    if in_place:
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    model(*clips())
    before = len(runs)
    check(metered(model, *clips()), expected())
    assert len(runs) == before > 0
    model(*clips())
    assert len(runs) == 2 * before


@torch.no_grad()
def test_a_layer_in_which_nothing_fires_is_a_spiking_layer():
    model = network()
    nn.init.zeros_(model.snn.stages[1][0].bn1.weight)
    nn.init.constant_(model.snn.stages[1][0].bn1.bias, -1.0)
    with SpikeMeter(model) as meter:
        model(*clips())
    layers = spike_statistics(meter.sums(), meter.layers)["layers"]
    dense = {name: layer["dense"] for name, layer in spiking_conv_layers(model, 6, 32).items()}
    assert {name: layer["dense"] for name, layer in layers.items()} == dense
    assert layers["stage2.block1.conv2"] == {"mean": 0, "std": 0, "rate": 0, "dense": dense["stage2.block1.conv2"]}
    assert layers["stage2.block1.conv1"]["mean"] > 0


class Graded(LIF):
    def forward(self, current):
        return self.counted(super().forward(current) * 0.5)


@torch.no_grad()
def test_values_other_than_0_and_1_are_refused(monkeypatch):
    monkeypatch.setitem(NEURONS, "graded", Graded)
    with pytest.raises(UserError, match=r"of 0 and 1; neuron Graded gives others at stage1\.block1\.conv1"):
        metered(network(neuron_type="graded"), *clips())
    model = network()
    model.snn.stages[2][1].conv2.register_forward_pre_hook(lambda conv, inputs: (2 * inputs[0],))
    with pytest.raises(RuntimeError, match=r"stage3\.block2\.conv2: expected spikes of 0 and 1") as raised:
        metered(model, *clips())
    assert not isinstance(raised.value, UserError)
    model = network()
    model.snn.stages[0][0].conv1.register_forward_pre_hook(lambda conv, inputs: (inputs[0] / 0.0,))
    with pytest.raises(RuntimeError, match=r"stage1\.block1\.conv1"):
        metered(model, *clips())


class _Waits(TorchDispatchMode):
    """Lists the operators that take a tensor of the host, which is copied to the GPU, or read one of the GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" for x in taken) or "_local_scalar" in function.name():
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_pass_never_waits_for_the_gpu(monkeypatch):
    """But the first of a size, which copies the fans there. Reading a tensor without memory would raise an error."""
    with fake_gpu(monkeypatch), torch.no_grad():
        model = ReSpike(num_classes=5, stride=2).eval()
        frames = torch.empty(2, 2, 3, 64, 64), torch.empty(2, 2, 1, 3, 64, 64)
        # A tensor that is made without a device lies on the CPU, as in a run on a GPU.
        with torch.device("cpu"), SpikeMeter(model) as meter:
            for _ in range(2):
                with _Waits() as waits:
                    model(*frames)
        assert meter.clips == 4
    assert not waits.found


def test_spikes_that_pass_the_meter_by_are_an_error():
    """With gradients, packed spikes reach the convolution's weights without its module."""
    with pytest.raises(RuntimeError, match=r"stage1\.block1\.conv1: its spikes were not seen"):
        metered(network(pack_spikes=True), *clips())


@torch.no_grad()
def test_sums_of_ranks_add_up_to_mean_and_deviation():
    key, residual = clips(batch=3)
    model = network()
    first, second = metered(model, key[:2], residual[:2]), metered(model, key[2:], residual[2:])
    empty = SpikeMeter(model).sums()
    found = spike_statistics(ALONE.sum(first + second + empty), SpikeMeter(model).layers)
    want = counted_by_loops(model, key, residual)
    assert found["clips"] == 3
    assert [found["mean"], found["std"]] == pytest.approx([want.sum(0).mean(), want.sum(0).std()])
    assert [layer["std"] for layer in found["layers"].values()] == pytest.approx(want.std(1).tolist())
    rates = [spikes / steps for spikes, steps in zip(*(first + second)[:-1, 3:5].T.tolist(), strict=True)]
    assert [layer["rate"] for layer in found["layers"].values()] == rates and 0 < min(rates) < max(rates) < 1


# ---- energy


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
    assert parts["spiking_convs"]["mj"] == pytest.approx(1.7, abs=0.05)
    assert report["total_mj"] == pytest.approx(121, abs=0.5) == sum(part["mj"] for part in parts.values())
    assert sum(part["mj"] for row, part in parts.items() if row.startswith("fusion")) == pytest.approx(41, abs=0.5)
    assert parts["resnet"]["mj"] == pytest.approx(75, abs=0.5)
    times = {name: other["mj"] / report["total_mj"] for name, other in report["baselines"].items()}
    assert times["resnet50_all_frames"] == pytest.approx(2.5, abs=0.05)
    assert times["r2plus1d_18_224"] == pytest.approx(6.15, abs=0.005)
    assert times["r2plus1d_18_112"] == pytest.approx(1.5, abs=0.05)
    want = OPS["respike_resnet50_T16_stride4_224_downsample"]
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
    assert list(even) == ["resnet18_all_frames"]
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


def test_statistics_of_each_step_fold_into_weights_of_each_step():
    """Batch norm costs no operation; the SNN's convolutions are read once for each of the 3 steps."""
    counted = []
    for mode in ("per-step", "through-time"):
        with torch.device("meta"):
            model = ReSpike(stride=4, snn_batch_norm=mode)
        convs = sum(w.numel() for name, w in model.snn.named_parameters() if "conv" in name and name.endswith("weight"))
        counted.append((count_operations(model, 8, 64), count_memory(model, 8, 64)))
    (operations, memory), (each_operations, each_memory) = counted
    assert each_operations == operations
    assert each_memory == memory | {"weights.dram": memory["weights.dram"] + 2 * 32 * convs}


def test_memory_by_hand():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    weights, frames = (8 * 27, 5 * 2048), 2
    assert count_memory(layers, frames, 32) == {
        "weights.dram": 32 * sum(weights),
        "weights.sram": 32 * frames * sum(weights),
        "activations.sram": 32 * frames * (3 * 32 * 32 + 2 * 2048 + 5),
        "spikes.sram": 0,
        "membranes.sram": 0,
    }
    model = network()
    spiking, relu = count_memory(model, 6, 32), count_memory(model, 6, 32, spiking=False)
    steps = count_operations(model, 6, 32)["snn.lif_neuron_steps"]
    assert spiking["spikes.sram"] == 2 * steps and spiking["membranes.sram"] == 3 * 32 * steps
    assert relu["activations.sram"] - spiking["activations.sram"] == 32 * steps
    assert relu["spikes.sram"] == relu["membranes.sram"] == 0
    mj = Constants(sram_64bit_pj=64.0, dram_64bit_pj=640.0).memory_mj({"weights.dram": 10**9, "weights.sram": 10**9})
    assert mj == {"weights.dram": 10.0, "weights.sram": 1.0, "total": 11.0}


def test_the_table_names_what_it_is_and_is_aligned():
    lines = format_report(published()).splitlines()
    assert energy.NOTE in lines[0]
    table = lines[1 : lines.index(next(line for line in lines if line.startswith("total"))) + 1]
    assert len({len(line) for line in table}) == 1 and len(table) == 20
    assert "resnet18_all_frames" in "\n".join(lines) and "83.4 %" in "\n".join(lines)


def test_a_layer_without_a_rate_is_named():
    with pytest.raises(UserError, match=r"found none of stage1\.block1\.conv2"):
        assumed_spikes(network(), 6, 32, {"stage1.block1.conv1": 0.1})
