"""The whole network on the fused kernels: in Triton's interpreter, on a GPU natively."""

from collections import Counter

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dataset import residual, residual_kernel
from dataset.residual import key_residual_split
from models import ReSpike
from models.kernels.packing import pack_spikes, spike_conv2d, unpack_spikes
from models.neurons import BACKENDS
from models.respike import FUSIONS
from tests.helpers.fake_gpu import fake_gpu, launch_nothing
from tests.helpers.spikingjelly import skip_without_spikingjelly
from tests.models.kernels.test_lif_kernels import DEVICE, channels_last
from tests.models.test_golden import CASES, GOLDEN, TOLERANCE, golden_input, published_state_dict
from utils.training.metrics import FiringRates

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def golden():
    with numpy.load(GOLDEN / "respike.npz") as arrays:
        yield {name: arrays[name] for name in arrays.files}


# The interpreter takes half a minute for one.
@pytest.mark.usefixtures("wide_programs")
@pytest.mark.parametrize("backbone, variant, stride", CASES if DEVICE == "cuda" else [("resnet18", "full", 4)])
def test_agrees_with_the_published_network(golden, backbone, variant, stride):
    want = f"{backbone}.{variant}.stride{stride}.T8."
    model = ReSpike(backbone, num_classes=7, stride=stride, downsample=variant == "downsample", lif_backend="triton")
    model = model.double()
    model.load_reference_state_dict(published_state_dict(backbone))
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    key, residual = (value.to(DEVICE) for value in golden_input(stride))
    with FiringRates(model.train()) as rates:
        logits = model(key, residual)
    loss = F.cross_entropy(logits, torch.tensor([1, 4], device=DEVICE))
    loss.backward()
    assert min(rates.per_layer()) > 0
    numpy.testing.assert_allclose(logits.detach().cpu().numpy(), golden[want + "train_logits"], **TOLERANCE)
    got = sorted(p.grad.norm().item() for p in model.parameters())
    norms = sorted(norm for norm in golden[want + "grad_norms"] if norm >= 0)
    numpy.testing.assert_allclose(got, norms, rtol=1e-8, atol=1e-11)
    running = model.snn.stages[0][0].bn1.running_mean.cpu().numpy()
    numpy.testing.assert_allclose(running, golden[want + "running_mean_after"], **TOLERANCE)


class _Calls(TorchDispatchMode):
    """Counts this project's operators, and notes the types of the spikes that they write."""

    def __init__(self):
        super().__init__()
        self.operators = Counter()
        self.others = set()
        self.spikes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace != "respike":
            self.others.add(function._opname)
        else:
            self.operators[function._opname] += 1
            spikes = {"lif": 0, "batch_norm": 1}.get(function._opname)
            if spikes is not None and out[spikes].numel():
                self.spikes.add(out[spikes].dtype)
        return out


def small(**options) -> ReSpike:
    torch.manual_seed(0)
    return ReSpike(num_classes=5, stride=2, **options).to(DEVICE, memory_format=torch.channels_last).train()


def clip(size=32):
    return torch.randint(0, 256, (2, 4, size, size, 3), dtype=torch.uint8, device=DEVICE).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize(
    "options, norms, alone, blocks",
    [
        ({"branches": "snn"}, 21, 0, 0),
        ({"downsample": False}, 21 + 20, 3 - 1, 3),
        ({"downsample": True}, 21 + 20, 3, 4),
    ],
    ids=["snn", "full", "downsample"],
)
def test_layers_are_fused_wherever_they_follow_each_other(monkeypatch, options, norms, alone, blocks):
    """The SNN's stem and 8 blocks have 21 batch norms, 16 of them before neurons; neurons run alone only where
    fusion with the other branch stands between. The ANN has 20, and neither addition nor ReLU behind them."""
    with fake_gpu(monkeypatch), torch.no_grad(), _Calls() as calls:
        model = ReSpike(num_classes=5, stride=2, **options).train()
        model(*key_residual_split(torch.empty(2, 4, 3, 32, 32), 2))
    assert calls.operators == Counter(
        moments_and_running=norms, batch_norm=norms, lif=alone, geglu=blocks, group_norm=blocks
    )
    assert not calls.others & {"relu", "relu_", "native_batch_norm"}


@pytest.mark.parametrize(
    "options",
    [{"branches": "ann"}, {"branches": "snn"}, *({"fusion": name} for name in FUSIONS if name != "concat")],
    ids=lambda options: next(iter(options.values())),
)
def test_every_network_compiles_as_one_graph(monkeypatch, options):
    """Forward and backward. Kernels are traced and not launched; their results are compared with less."""
    launch_nothing(monkeypatch)
    model = small(lif_backend="triton", **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*key_residual_split(clip(), 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("wide_programs")
def test_spikes_are_written_in_the_type_that_convolutions_compute_in():
    """As the kernels write them: autocast would convert any other type before a convolution sees it."""
    model = small(lif_backend="triton")
    key, residual = key_residual_split(clip(), 2, torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.no_grad(), _Calls() as calls:
        model(key, residual)
    assert calls.spikes == {torch.bfloat16} and calls.operators["lif"] == 3


def test_convolutions_are_the_same_every_time_here():
    """On a GPU; else tolerances of 1e-4 and exact spikes would fail now and then (`exact_on_a_gpu`)."""
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("wide_programs")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "auto"])
def test_backends_agree_on_a_training_step(backend):
    skip_without_spikingjelly(backend)
    results = []
    for name in ("reference", backend):
        model = small(lif_backend=name, branches="snn").double()
        key, residual = (value.double() for value in key_residual_split(clip(), 2))
        torch.manual_seed(1)
        loss = model(key, residual).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch.manual_seed(0)
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


# ---- spikes as bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5, 3, 7), (1, 1, 8, 2, 2), (2, 1, 3, 40, 40)], ids=str)
def test_packing_is_exact(shape, dtype):
    for layout in (lambda x: x, channels_last):
        spikes = layout((torch.rand(shape, device=DEVICE) < 0.3).to(dtype))
        packed = pack_spikes(spikes)
        assert packed.dtype == torch.uint8 and packed.numel() == -(-spikes.numel() // 8)
        order = sorted(range(1, 5), key=spikes.stride, reverse=True)
        unpacked = unpack_spikes(packed, list(shape), order, dtype)
        assert torch.equal(unpacked, spikes) and unpacked.stride() == spikes.stride()


@pytest.mark.parametrize("padding", [0, 1])
def test_convolution_of_packed_spikes(padding):
    conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=padding, bias=False).to(DEVICE)
    spikes = channels_last((torch.rand(3, 2, 4, 9, 9, device=DEVICE) < 0.3).float()).requires_grad_()
    results = []
    for out in (conv(spikes.flatten(0, 1)).unflatten(0, (3, 2)), spike_conv2d(conv, spikes)):
        results.append((out, *torch.autograd.grad(out.square().sum(), [spikes, conv.weight])))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    spikes = spikes.detach()
    torch.library.opcheck(pack_spikes.definition, (spikes,))
    as_before = [3, 2, 4, 9, 9], [1, 3, 4, 2], torch.float32
    torch.library.opcheck(unpack_spikes.definition, (pack_spikes(spikes), *as_before))


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_packed_spikes_change_nothing_but_memory(precision):
    """The same gradients; what autograd keeps shrinks by the spikes' 15 bits of 16, or 31 of 32."""
    gradients, kept, spiking = [], [], 0
    for pack in (False, True):
        model = small(branches="snn", pack_spikes=pack)
        key, residual = key_residual_split(clip(), 2, precision)
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autocast(DEVICE, dtype=precision, enabled=precision is not None):
            with FiringRates(model) as rates, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(key, residual).float().square().sum()
            spiking = sum(layer.neuron_steps.item() for layers in model.lif_layers().values() for layer in layers)
            del rates
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(storages.values()))
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    bytes_each = 4 if precision is None else 2
    assert kept[0] - kept[1] == pytest.approx(spiking * (bytes_each - 1 / 8), rel=0.02)


# ---- normalisation and the split into key and residual frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("minus, channels", [("key", 3), ("key", 8), ("previous", 8), ("none", 8), ("none", 3)])
def test_split_kernel_agrees_with_the_definition(minus, channels, stride, dtype):
    frames = torch.randint(0, 256, (2, 3, stride, 19, 21, 3), dtype=torch.uint8)
    frames[0, 0, 1:] = frames[0, 0, :1]  # a static segment
    want = residual._split(frames, torch.float32, minus)
    constants = residual._SCALE, residual._SCALED_MEAN
    got = residual_kernel.split(frames.to(DEVICE), *constants, dtype, residual.RESIDUALS.index(minus), channels)
    for g, w in zip(got, want, strict=True):
        w = F.pad(w, (0, channels - 3))
        assert g.dtype == dtype and g.shape == w.shape
        torch.testing.assert_close(g.cpu().float(), w, rtol=0 if dtype == torch.float32 else 8e-3, atol=2e-6)
    assert minus == "none" or not got[1][:, 0, 0].any()
