"""The benchmark measures what it names, and one implementation that fails costs no other its figures."""

import json
import sys

import pytest
import torch

from benchmarks import bench_lif

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_failing_build_is_listed_and_the_others_are_measured(monkeypatch, capsys, tmp_path):
    def broken(x, residual):
        raise RuntimeError("no kernel image\nmore lines")

    def builds(layer, *settings):
        return {"broken": broken, "whole": lambda x, residual: (x + residual if "residual" in layer else None, x * 2)}

    monkeypatch.setattr(bench_lif, "implementations", builds)
    arguments = ["bench_lif", "--shape", "2", "1", "4", "3", "3", "--rounds", "2", "--json", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench_lif.main() == 1
    written = json.loads((tmp_path / "figures").read_text())
    assert [figure["build"] for figure in written["figures"]] == ["whole"] * 3
    assert [failure["build"] for failure in written["failures"]] == ["broken"] * 3
    out = capsys.readouterr().out
    assert out.count("failed: RuntimeError: no kernel image\n") == 3 and "more lines" not in out
    assert "batch norm of the other builds: Native" in out


def test_nobody_asks_for_the_membrane(monkeypatch):
    """Written in float32 it would add a third to the bytes of LIF forward in bfloat16."""
    asked = []

    def lif(current, parameters, backend, keep_v=True):
        asked.append((backend, keep_v))
        return current, None

    monkeypatch.setattr(bench_lif, "lif", lif)
    monkeypatch.setattr(bench_lif, "why_not_on", lambda device: None)
    builds = bench_lif.implementations("LIF", 4, CUDA, torch.bfloat16, False)
    builds["ours, triton"](torch.zeros(2, 3), None)
    assert asked == [("triton", False)]


def test_the_reference_copies_numbers_that_differ(monkeypatch):
    copied = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: copied.append(source) or copy_(self, source))
    assert bench_lif.measured_copy([64, 64], torch.float32, CPU, 1) > 0
    assert all(len(source.unique()) > 1000 for source in copied) and copied


@pytest.mark.parametrize("layer", bench_lif.LAYERS)
def test_missing_spikingjelly_fails_only_when_it_runs(monkeypatch, layer):
    for name in [name for name in sys.modules if name.startswith("spikingjelly.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "spikingjelly", None)
    builds = bench_lif.implementations(layer, 4, CPU, torch.float32, False)
    with pytest.raises(ImportError):
        builds["SpikingJelly"](torch.zeros(2, 2, 4, 3, 3), torch.zeros(2, 2, 4, 3, 3))
