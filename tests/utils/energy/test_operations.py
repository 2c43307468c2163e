"""Counts against independent ones of all published sizes, and by hand."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from models import ReSpike
from models.attention import Attention
from utils.energy.operations import count_operations, spiking_conv_layers

OPS = json.loads((Path(__file__).parents[2] / "golden" / "ops.json").read_text())


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
