"""The published network's state-dict names (github.com/GinnyXiao/ReSpike) and this project's."""

import re

from torch import Tensor, nn

from models.batch_norm import fit_running
from utils.errors import UserError

# Applied in order to this project's name; the result is the published one.
_RENAMES = [
    (r"^head\.", "fc."),
    (r"^ann\.stem\.", "ann_layer0."),
    (r"^ann\.stages\.(\d)", lambda m: f"ann_layer{int(m[1]) + 1}"),
    (r"^snn\.stem\.conv\.", "snn_backbone.conv1."),
    (r"^snn\.stem\.bn\.", "snn_backbone.bn1."),
    (r"^snn\.stages\.(\d)", lambda m: f"snn_backbone.layer{int(m[1]) + 1}"),
    (r"\.shortcut_conv\.", ".shortcut.1."),
    (r"\.shortcut_bn\.", ".shortcut.2."),
    (r"^fusions\.(\d)\.(proj_in|proj_out|norm)\.", lambda m: f"snn_backbone.fusion{int(m[1]) + 1}.{m[2]}."),
    (r"^fusions\.(\d)\.", lambda m: f"snn_backbone.fusion{int(m[1]) + 1}.transformer_blocks.0."),
    (r"\.attend_self\.", ".attn1."),
    (r"\.attend_ann\.", ".attn2."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.feed_forward\.proj_in\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.proj_out\.", ".ff.net.2."),
    (r"\.norm_self\.", ".norm1."),
    (r"\.norm_cross\.", ".norm2."),
    (r"\.norm_feed_forward\.", ".norm3."),
]
_POINTWISE = re.compile(r"^fusions\.\d\.proj_(in|out)\.weight$")  # 1x1 convolutions there, linear layers here
_UNUSED_WITHOUT_DOWNSAMPLE = "snn_backbone.fusion1."  # both published variants have it, one never calls it


def published_names(model: nn.Module) -> dict[str, str]:
    """Published name -> this project's, for every parameter and buffer of a `ReSpike`."""
    names = {}
    for own in model.state_dict():
        published = own
        for pattern, replacement in _RENAMES:
            published = re.sub(pattern, replacement, published)
        names[published] = own
    return names


def rename_published_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict under this project's names, checked against `model`'s own. Its running statistics are of
    all time steps, whatever `model` keeps: `models.batch_norm.fit_running` fits them.

    Raises UserError naming, as published, what is missing, unknown or of another shape.
    """
    own_names, own = published_names(model), model.state_dict()
    renamed, unknown = {}, []
    for published, value in state_dict.items():
        published = published.removeprefix("module.")  # saved from DataParallel
        if published not in own_names:
            if model.downsample or not published.startswith(_UNUSED_WITHOUT_DOWNSAMPLE):
                unknown.append(published)
            continue
        name = own_names[published]
        if _POINTWISE.match(name) and value.dim() == 4:
            value = value.flatten(1)
        renamed[name] = value
    fitted = dict(renamed)
    fit_running(fitted, own)
    misshapen = [
        f"{published} is {list(fitted[name].shape)} where {list(own[name].shape)} is wanted"
        for published, name in own_names.items() if name in fitted and fitted[name].shape != own[name].shape
    ]  # fmt: skip
    missing = [published for published, name in own_names.items() if name not in renamed]
    problems = [
        f"{len(items)} {what}, the first: {items[0]}"
        for what, items in (("unknown names", unknown), ("missing tensors", missing), ("misshapen tensors", misshapen))
        if items
    ]
    if problems:
        raise UserError("not a state dict of the published network with these settings: " + "; ".join(problems))
    return renamed
