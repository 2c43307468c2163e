"""Batch norm of each time step, by hand."""

import pytest
import torch
import torch.nn.functional as F

from models import ReSpike
from models.batch_norm import StepBatchNorm2d, fit_running

SCALES = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[:, None, None, None, None]  # residuals grow


def steps(**more) -> torch.Tensor:
    """[3, 4, 5, 2, 6], each step with a mean and a variance of its own."""
    return torch.randn(3, 4, 5, 2, 6, dtype=torch.float64, **more) * SCALES + SCALES


def through_time() -> StepBatchNorm2d:
    return StepBatchNorm2d(5, "through-time", "reference", steps=3).double()


def test_each_step_updates_its_own_statistics_once_and_is_tested_by_them():
    norm = through_time()
    mean, variance = torch.zeros(3, 5, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64)
    for batch in (steps(), steps()):
        total, _ = norm.train()(batch)
        mean = 0.9 * mean + 0.1 * batch.mean((1, 3, 4))
        variance = 0.9 * variance + 0.1 * batch.var((1, 3, 4), correction=1)
        per_step, _ = StepBatchNorm2d(5, "per-step", "reference").double().train()(batch)
        torch.testing.assert_close(total, per_step)
    torch.testing.assert_close([norm.running_mean, norm.running_var], [mean, variance], rtol=1e-12, atol=0)
    assert norm.num_batches_tracked == 2
    x = steps()
    want = torch.stack([F.batch_norm(x[s], mean[s], variance[s], norm.weight, norm.bias) for s in range(3)])
    torch.testing.assert_close(norm.eval()(x)[0], want, rtol=1e-12, atol=1e-12)
    for step in range(3):
        torch.testing.assert_close(norm(x[step : step + 1], first_step=step)[0], want[step : step + 1])


def test_a_step_without_statistics_is_an_error():
    norm = through_time()
    for mode, first in ((True, 0), (False, 0), (False, 3)):
        with pytest.raises(ValueError, match="knows 3 time steps, got 4"):
            norm.train(mode)(torch.zeros(4 if first == 0 else 1, 4, 5, 2, 2).double(), first_step=first)


def test_shared_statistics_are_taken_for_every_step_and_put_together_again():
    own = ReSpike(branches="snn", snn_batch_norm="through-time", stride=4).state_dict()
    shared = ReSpike(branches="snn").state_dict()
    name = "snn.stem.bn.running_"
    shared[f"{name}mean"] = torch.arange(64.0)
    weights = dict(shared)
    assert fit_running(weights, own) and not fit_running(weights, own)
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in own.items()}
    assert torch.equal(weights[f"{name}mean"], torch.arange(64.0).repeat(3, 1))
    assert fit_running(weights, shared) and torch.equal(weights[f"{name}mean"], torch.arange(64.0))

    x = torch.randn(3, 7, 64) * SCALES[:, 0, 0].float()
    weights = own | {f"{name}mean": x.mean(1), f"{name}var": x.var(1, correction=0)}
    assert fit_running(weights, shared)
    torch.testing.assert_close(weights[f"{name}var"], x.flatten(0, 1).var(0, correction=0))
