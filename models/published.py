"""The published network's state-dict names (github.com/GinnyXiao/ReSpike) and this project's."""

import re

from torch import Tensor, nn

from utils.errors import UserError

# Applied in order to a published name; the result is this project's.
_RENAMES = [
    (r"^ann_layer0\.0\.", "ann.stem.0."),
    (r"^ann_layer0\.1\.", "ann.stem.1."),
    (r"^ann_layer([1-4])\.", lambda m: f"ann.stages.{int(m[1]) - 1}."),
    (r"^snn_backbone\.conv1\.", "snn.stem.conv."),
    (r"^snn_backbone\.bn1\.", "snn.stem.bn."),
    (r"^snn_backbone\.layer([1-4])\.", lambda m: f"snn.stages.{int(m[1]) - 1}."),
    (r"\.shortcut\.1\.", ".shortcut_conv."),
    (r"\.shortcut\.2\.", ".shortcut_bn."),
    (r"^snn_backbone\.fusion([1-4])\.", lambda m: f"fusions.{int(m[1]) - 1}."),
    (r"\.transformer_blocks\.0\.", "."),
    (r"\.attn1\.", ".attend_self."),
    (r"\.attn2\.", ".attend_ann."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.ff\.net\.0\.proj\.", ".feed_forward.proj_in."),
    (r"\.ff\.net\.2\.", ".feed_forward.proj_out."),
    (r"\.norm1\.", ".norm_self."),
    (r"\.norm2\.", ".norm_cross."),
    (r"\.norm3\.", ".norm_feed_forward."),
    (r"^fc\.", "head."),
]
_POINTWISE = re.compile(r"^fusions\.\d\.proj_(in|out)\.weight$")  # 1x1 convolutions there, linear layers here


def published_to_own_name(name: str) -> str:
    """This project's name of a published parameter or buffer; a name it does not know comes back changed
    or not, and is then found nowhere in the model."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def rename_published_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict under this project's names, checked against `model`'s own.

    Raises UserError naming what is missing, unknown or of another shape.
    """
    own = model.state_dict()
    renamed, unknown, misshapen = {}, [], []
    for published, value in state_dict.items():
        if published.startswith("module."):  # saved from DataParallel
            published = published.removeprefix("module.")
        name = published_to_own_name(published)
        if name.startswith("fusions.0.") and not model.downsample:
            continue
        if name not in own:
            unknown.append(published)
            continue
        if _POINTWISE.match(name) and value.dim() == 4:
            value = value.flatten(1)
        if value.shape != own[name].shape:
            misshapen.append(f"{published} is {list(value.shape)} where {list(own[name].shape)} is wanted")
        renamed[name] = value
    missing = sorted(set(own) - set(renamed))
    problems = [
        f"{len(items)} {what}, the first: {items[0]}"
        for what, items in (("unknown names", unknown), ("missing tensors", missing), ("misshapen tensors", misshapen))
        if items
    ]
    if problems:
        raise UserError("not a state dict of the published network with these settings: " + "; ".join(problems))
    return renamed
