"""Spikes against loops over spikes and kernel taps."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataset.residual import key_residual_split
from models import ReSpike
from models.batch_norm import StepBatchNorm2d
from models.neurons import LIF, NEURONS
from tests.helpers.fake_gpu import fake_gpu
from tests.helpers.spikingjelly import skip_without_spikingjelly
from utils.energy.operations import spiking_conv_layers
from utils.energy.spikes import SpikeMeter, assumed_spikes, spike_statistics
from utils.errors import UserError
from utils.runtime import ALONE


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


def test_a_layer_without_a_rate_is_named():
    with pytest.raises(UserError, match=r"found none of stage1\.block1\.conv2"):
        assumed_spikes(network(), 6, 32, {"stage1.block1.conv1": 0.1})
