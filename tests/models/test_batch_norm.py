"""Batch norm of each time step, and statistics measured on many batches, by hand."""

import pytest
import torch
import torch.nn.functional as F

from models import ReSpike
from models.batch_norm import (
    BATCH_NORMS,
    FrameBatchNorm2d,
    FusedBatchNorm2d,
    MeasuredStatistics,
    StepBatchNorm2d,
    fit_running,
)
from tests.models.kernels.test_lif_kernels import DEVICE

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


# ---- statistics that are measured


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mode", BATCH_NORMS)
def test_measured_statistics_are_those_of_all_values(mode, backend):
    """Batches of unequal sizes and means: neither the mean of their variances nor that of the steps'."""
    norm = StepBatchNorm2d(5, mode, backend, steps=3).double().to(DEVICE).train()
    norm.running_mean += 7.0
    before = {name: value.clone() for name, value in norm.named_buffers()}
    batches = [(steps() * (number + 1.0) + number)[:, :size].to(DEVICE) for number, size in enumerate((4, 1, 3))]
    with MeasuredStatistics(norm) as statistics, torch.no_grad():
        for batch in batches:
            total, _ = norm(batch)
            sets = (1, 3, 4) if mode == "through-time" else (0, 1, 3, 4)  # as evaluation shares them
            torch.testing.assert_close(
                total.var(sets, correction=0), torch.ones_like(total.mean(sets)), rtol=1e-3, atol=0
            )
        assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
        statistics.take()
    values = torch.cat(batches, 1)  # [S, all, C, H, W]
    assert norm.running_mean.shape == before["running_mean"].shape
    torch.testing.assert_close(norm.running_mean, values.mean(sets), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, values.var(sets, correction=1), rtol=1e-12, atol=0)
    assert norm.tally is None and norm.num_batches_tracked == before["num_batches_tracked"]


def test_what_is_trained_in_both_branches_is_measured_and_a_frozen_branch_is_not():
    x = torch.randn(3, 2, 3, 32, 32), torch.randn(3, 2, 1, 3, 32, 32)
    for frozen in (False, True):
        model = ReSpike(num_classes=3, stride=2)
        if frozen:
            model.freeze_ann()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with MeasuredStatistics(model.train()) as statistics, torch.no_grad():
            seen = {}
            for name, module in model.named_modules():
                if isinstance(module, FusedBatchNorm2d):
                    module.register_forward_hook(lambda _, x, out, name=name, seen=seen: seen.update({name: x[0]}))
            model(*x)
            statistics.take()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        trained = {name for name in seen if not (frozen and name.startswith("ann."))}
        assert changed == {f"{name}.running_{kind}" for name in trained for kind in ("mean", "var")}
        for name in trained:  # of one batch: what each layer saw of it
            values = seen[name].unsqueeze(0) if name.startswith("ann.") else seen[name]
            got = model.get_submodule(name).running_var
            torch.testing.assert_close(got, values.var((0, 1, 3, 4)), rtol=1e-5, atol=1e-7)


def test_statistics_are_kept_if_the_measurement_is_not_taken():
    norm = FrameBatchNorm2d(5, "reference").train()
    before = norm.running_var.clone()
    with MeasuredStatistics(norm), torch.no_grad():
        norm(torch.randn(4, 5, 3, 3) * 9)
    assert torch.equal(norm.running_var, before) and norm.tally is None
