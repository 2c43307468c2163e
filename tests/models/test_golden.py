"""The whole network against numbers computed by the published code (tests/golden/respike.npz)."""

import functools
import itertools
import json
import zlib
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F

from dataset.residual import key_residual_split
from models import ReSpike
from models.published_weights import published_names
from utils.training.metrics import FiringRates

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = list(itertools.product(("resnet18", "resnet50"), ("downsample", "full"), (2, 4)))
TOLERANCE = dict(rtol=1e-9, atol=1e-12)


def published_state_dict(backbone: str) -> dict[str, torch.Tensor]:
    return dict(_published_state_dict(backbone))


@functools.lru_cache(maxsize=1)  # 200 MB for a ResNet-50
def _published_state_dict(backbone: str) -> dict[str, torch.Tensor]:
    """Every tensor filled from its name, by the rule the golden numbers were made with."""
    shapes = json.loads((GOLDEN / "respike_state_dict.json").read_text())[backbone]
    state_dict = {}
    for name, shape in shapes.items():
        n = numpy.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            value = numpy.zeros(shape, dtype=numpy.int64)
        elif name.endswith("running_var"):
            value = 0.5 + numpy.abs(n)
        elif name.endswith(("running_mean", ".bias")):
            value = 0.1 * n
        elif len(shape) == 1:
            value = (3 if name.startswith("snn_backbone") and ".bn" in name else 1) + 0.1 * n
        else:
            value = n / numpy.sqrt(numpy.prod(shape[1:]))
        state_dict[name] = torch.as_tensor(value)
    return state_dict


def build(backbone: str, variant: str, stride: int, snn_batch_norm: str = "per-step") -> ReSpike:
    model = ReSpike(backbone, 7, stride, variant == "downsample", snn_batch_norm=snn_batch_norm).double()
    model.load_reference_state_dict(published_state_dict(backbone))
    return model


def golden_input(stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    clip = numpy.random.default_rng(20240901).standard_normal((2, 8, 3, 64, 64))
    return key_residual_split(torch.from_numpy(clip), stride)


@pytest.fixture(scope="module")
def golden():
    with numpy.load(GOLDEN / "respike.npz") as arrays:
        yield {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize("backbone, variant, stride", CASES)
def test_evaluation_agrees_with_the_published_network(golden, backbone, variant, stride):
    want = f"{backbone}.{variant}.stride{stride}.T8."
    model = build(backbone, variant, stride).eval()
    with torch.no_grad(), FiringRates(model) as rates:
        logits = model(*golden_input(stride))
    numpy.testing.assert_allclose(logits.numpy(), golden[want + "eval_logits"], **TOLERANCE)
    numpy.testing.assert_allclose(rates.per_layer(), golden[want + "firing_rate"], **TOLERANCE)


def test_published_weights_with_statistics_of_each_step(golden):
    """Taken for every step they give the published figures, in evaluation and in training."""
    backbone, variant, stride = CASES[1]  # three steps
    model, want = build(backbone, variant, stride, "through-time"), f"{backbone}.{variant}.stride{stride}.T8."
    for mode in ("eval", "train"):
        with torch.no_grad():
            logits = model.train(mode == "train")(*golden_input(stride))
        numpy.testing.assert_allclose(logits.numpy(), golden[f"{want}{mode}_logits"], **TOLERANCE)


@pytest.mark.parametrize("backbone, variant, stride", CASES)
def test_training_step_agrees_with_the_published_network(golden, backbone, variant, stride):
    want = f"{backbone}.{variant}.stride{stride}.T8."
    model = build(backbone, variant, stride).train()
    logits = model(*golden_input(stride))
    loss = F.cross_entropy(logits, torch.tensor([1, 4]))
    loss.backward()
    numpy.testing.assert_allclose(logits.detach().numpy(), golden[want + "train_logits"], **TOLERANCE)
    numpy.testing.assert_allclose(loss.item(), golden[want + "train_loss"], **TOLERANCE)

    parameters, own_names = dict(model.named_parameters()), published_names(model)
    compared = set()
    for name, norm in zip(golden[want + "grad_names"], golden[want + "grad_norms"], strict=True):
        if norm < 0:  # never used by the published forward: this model does not have it
            assert str(name) not in own_names
            continue
        own = own_names[str(name)]
        got = parameters[own].grad.norm().item()
        assert got == pytest.approx(norm, rel=1e-9, abs=1e-12), name
        compared.add(own)
    assert compared == set(parameters)
    numpy.testing.assert_allclose(
        model.snn.stages[0][0].bn1.running_mean.numpy(), golden[want + "running_mean_after"], **TOLERANCE
    )
