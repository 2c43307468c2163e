"""Several processes give what one gives: gradients and counts."""

import pytest
import torch

from models.batch_norm import BATCH_NORMS
from tests.helpers.script import finish, start_ranks


@pytest.fixture(scope="module")
def computed(tiny_demo, tmp_path_factory) -> dict[int, dict]:
    """What 1, 2 and 3 processes computed."""
    out = tmp_path_factory.mktemp("computed")
    finish(start_ranks(["compute", tiny_demo[0], out], 1, 2, 3))
    return {processes: torch.load(out / str(processes)) for processes in (1, 2, 3)}


@pytest.mark.parametrize("case", ["fixed", *BATCH_NORMS, "accumulated", "empty batch", "film", "fused"])
def test_gradients_of_two_processes_are_those_of_the_doubled_batch(computed, case):
    """In float64, with batch norm in evaluation mode or synchronised; with two batches a step too, also where one
    process has nothing to train on in the second."""
    # (Two batches a step in two processes are one batch four times as large.)
    whole, parts = computed[1]["fixed" if case == "accumulated" else case], computed[2][case]
    largest = max(gradient.abs().max() for gradient in whole["gradients"].values())
    assert largest > 1e-3
    for kind in ("gradients", "buffers"):
        for name, want in whole[kind].items():
            torch.testing.assert_close(parts[kind][name], want, rtol=1e-9, atol=1e-9 * float(largest), msg=name)


def test_counts_do_not_depend_on_the_number_of_processes(computed):
    assert computed[1]["counts"] == computed[2]["counts"] == computed[3]["counts"]
    seven, many = computed[1]["counts"]
    assert (seven["videos"], seven["clips"], many["videos"], many["clips"]) == (7, 14, 37, 74)
    assert 0 < many["video_top1"] < 37 and many["video_top1"] < many["video_top5"]


def test_measured_statistics_do_not_depend_on_the_number_of_processes(computed):
    """In float64; each mode's own, and unlike those at the start."""
    whole = computed[1]["measured"]
    assert not torch.equal(whole["per-step model.snn.stem.bn.running_var"], torch.ones(64, dtype=torch.float64))
    assert whole["through-time model.snn.stem.bn.running_var"].shape == (3, 64)
    for parts in (computed[2]["measured"], computed[3]["measured"]):
        for name, want in whole.items():
            torch.testing.assert_close(parts[name], want, rtol=1e-9, atol=1e-12, msg=name)
