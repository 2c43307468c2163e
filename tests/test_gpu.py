"""What only a CUDA device can show. Run with `make test-gpu`."""

import numpy
import pytest
import torch

from dataset.device_loader import to_device
from dataset.residual import key_residual_split
from models import ReSpike
from models.kernels.parameters import LIFParameters
from models.kernels.reference import lif_definition
from models.neurons import lif
from tests.helpers.script import command_line, finish, metrics, start_python
from tests.models.conftest import exact_on_a_gpu  # noqa: F401 - runs before each test
from tests.models.test_golden import CASES, GOLDEN, TOLERANCE, build, golden_input
from tests.utils.training.test_engine import make_loader
from utils.cuda_graphs import GraphedNetwork
from utils.device import choose_precision

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device, this machine has none")
    return torch.device("cuda")


@pytest.mark.parametrize("backbone, variant, stride", CASES)
def test_golden_logits_on_the_gpu(cuda, backbone, variant, stride):
    with numpy.load(GOLDEN / "respike.npz") as golden:
        want = golden[f"{backbone}.{variant}.stride{stride}.T8.eval_logits"]
    model = build(backbone, variant, stride).eval().to(cuda, memory_format=torch.channels_last)
    with torch.no_grad():
        logits = model(*(x.to(cuda) for x in golden_input(stride)))
    numpy.testing.assert_allclose(logits.cpu().numpy(), want, **TOLERANCE)


def test_split_on_the_gpu(cuda):
    clip = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    for here, there in zip(key_residual_split(clip, 4), key_residual_split(clip.to(cuda), 4), strict=True):
        torch.testing.assert_close(there.cpu(), here)


def test_batches_copied_ahead_are_the_same(cuda):
    for here, there in zip(make_loader(), to_device(iter(make_loader()), cuda), strict=True):
        assert all(tensor.is_cuda for tensor in there[:3])
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here[:3], there[:3], strict=True))


def test_precision_on_the_gpu(cuda):
    wanted = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    assert choose_precision(cuda, amp=True) == wanted and choose_precision(cuda, amp=False) is None


# ---- the fused kernels (their parity tests, marked `kernels`, run here natively as well)


def fused_network(cuda, **options) -> ReSpike:
    torch.manual_seed(0)
    return ReSpike(num_classes=5, **options).to(cuda, memory_format=torch.channels_last).train()


def clip(cuda, size=64) -> torch.Tensor:
    return torch.randint(0, 256, (2, 8, size, size, 3), dtype=torch.uint8, device=cuda).permute(0, 1, 4, 2, 3)


def training_step(model, clip, precision=torch.bfloat16) -> list[torch.Tensor]:
    key, residual = key_residual_split(clip, 4, precision)
    with torch.autocast("cuda", dtype=precision, enabled=precision is not None):
        loss = model(key, residual).float().square().sum()
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_more_than_two_to_the_31_elements(cuda):
    """3 x 2^30 neurons and steps; the last ones are compared."""
    current = torch.empty(3, 2**30, dtype=torch.bfloat16, device=cuda).normal_(std=2.0).requires_grad_()
    spikes, _ = lif(current, LIFParameters(), backend="triton")
    spikes.backward(torch.ones((), dtype=torch.bfloat16, device=cuda).expand_as(spikes).contiguous())
    last = current.detach()[:, -1000:].clone().requires_grad_()
    want, _ = lif_definition(last, LIFParameters())
    want.sum().backward()
    assert torch.equal(spikes[:, -1000:], want)
    torch.testing.assert_close(current.grad[:, -1000:], last.grad, rtol=1.6e-2, atol=1e-3)


def test_a_training_step_never_waits_for_the_gpu(cuda):
    model, frames = fused_network(cuda), clip(cuda)
    training_step(model, frames)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(model, frames)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"pack_spikes": True}], ids=["plain", "packed"])
def test_replayed_as_a_cuda_graph(cuda, options):
    model, frames = fused_network(cuda, **options), clip(cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training_step(model, frames)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(model, frames)
    graph.replay()
    for want, got in zip(training_step(model, frames), [value.clone() for value in captured], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_graphed_network_trains_as_the_plain_one(cuda):
    """Losses, weights and running statistics over some optimizer steps; one batch is smaller than the others."""
    results = []
    for graphed in (False, True):
        model = fused_network(cuda)
        key, residual = key_residual_split(clip(cuda), 4, torch.bfloat16)
        network = GraphedNetwork(model, key, residual, torch.bfloat16) if graphed else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        losses = []
        for clips in (2, 2, 1, 2, 2):
            torch.manual_seed(len(losses))
            losses.append(training_step(network, clip(cuda)[:clips])[0])
            optimizer.step()
        results.append([torch.stack(losses), *model.parameters(), *model.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_compiled_network_agrees(cuda):
    model, frames = fused_network(cuda, branches="snn"), clip(cuda)
    want = training_step(model, frames, None)
    got = training_step(torch.compile(model, fullgraph=True), frames, None)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


@pytest.mark.parametrize(
    "flags",
    [{}, *({flag: None} for flag in ("--compile", "--cuda-graphs", "--no-amp", "--pack-spikes", "--deterministic"))],
    ids=lambda flags: next(iter(flags), "plain"),
)
def test_training_runs_on_the_gpu(cuda, tiny_demo, tmp_path, monkeypatch, flags):
    import sys

    import train_fusion

    every = {
        "--dset": "hmdb51", "--data-root": tiny_demo[0], "--annotation-path": tiny_demo[1], "--weights": "none",
        "-T": 4, "--stride": 2, "--size": 64, "-b": 8, "-j": 2, "--epochs": 2, "-lr": 0.001, "--downsample": None,
        "--index-dir": tmp_path / "index", "--run-dir": tmp_path / "run", "--device": "cuda",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_fusion.py", *command_line(every | flags)])
    assert train_fusion.main() == 0
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("more", [{}, {"--sync-bn": None, "--accumulate": 2}], ids=["plain", "sync-bn"])
def test_two_gpus(tiny_lists, tmp_path, more):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    flags = tiny_lists | more | {
        "--weights": "none", "--downsample": None, "-T": 4, "--stride": 2, "--size": 32, "-b": 4, "-j": 1,
        "--epochs": 2, "--index-dir": tmp_path / "index", "--run-dir": tmp_path / "run",
    }  # fmt: skip
    finish(start_python(["train_kinetics.py", *command_line(flags)], processes=2))
    assert [line["counts"]["videos"] for line in metrics(tmp_path / "run")] == [8, 8]
