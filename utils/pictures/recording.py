"""What a network does with clips: its spikes, and its attention or modulation, kept from one forward pass."""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Network
from models.attention import HEAD_WIDTH


@dataclass(frozen=True)
class Recording:
    """One forward pass, on the CPU. N = B*K key frames, the key frames of a clip beside each other."""

    key: Tensor  # float32 [N, 3, H, W], normalised
    residual: Tensor  # float32 [N, S, 3, H, W]
    logits: Tensor  # float32 [B, classes]
    spikes: dict[str, Tensor]  # LIF layer, "stage1.1" to "stage4.4" -> bool [S, N, C, H', W']
    attention: dict[str, Tensor]  # stage fused by attention -> float32 [N, S, Q, L], `attention_weights`
    modulation: dict[str, Tensor]  # stage fused without attention -> float32 [N, h, w]: mean change at a place

    @property
    def fusion(self) -> str | None:
        """What `fusion_maps` show: "attention" or "modulation"; None without a fusion."""
        return "attention" if self.attention else "modulation" if self.modulation else None

    @property
    def key_frames(self) -> int:
        """K, of a clip."""
        return len(self.key) // len(self.logits)

    def firing_rates(self) -> Tensor:
        """[layers, S]: spikes of a layer at each time step over its neurons, clips and key frames."""
        return torch.stack([layer.float().flatten(1).mean(1) for layer in self.spikes.values()])

    def fusion_maps(self) -> dict[str, Tensor]:
        """Fused stage -> [N, h, w], divided by what it would be if it were even over the frame: how much of its
        attention the SNN gives to each token of the key frame, or how much a fusion without attention changes the
        currents at each place. For attention, an SNN token counts by the size of its input, the motion there."""
        moved = self.residual.abs().mean(2)  # [N, S, H, W]
        maps = {
            stage: change / (change.mean((1, 2), keepdim=True) + 1e-12) for stage, change in self.modulation.items()
        }
        for stage, weights in self.attention.items():
            moved_here = F.adaptive_avg_pool2d(moved, _grid(weights.shape[2], self.key)).flatten(2)  # [N, S, Q]
            share = moved_here + 1e-12  # where nothing moves, all tokens count alike
            share = share / share.sum((1, 2), keepdim=True)
            looked_at = torch.einsum("nsq,nsql->nl", share, weights) * weights.shape[3]
            maps[stage] = looked_at.unflatten(1, _grid(weights.shape[3], self.key))
        return maps


def _grid(tokens: int, frames: Tensor) -> tuple[int, int]:
    """Height and width of a grid of tokens over `frames` [..., H, W]."""
    height = round(math.sqrt(tokens * frames.shape[-2] / frames.shape[-1]))
    return height, tokens // height


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(32)), mean over heads: q [N, Q, C], k [N, L, C] -> float32 [N, Q, L]."""
    with torch.autocast(q.device.type, enabled=False):
        heads = zip(q.float().split(HEAD_WIDTH, dim=2), k.float().split(HEAD_WIDTH, dim=2), strict=True)
        scale = HEAD_WIDTH**-0.5
        total = sum((scale * q_head @ k_head.transpose(1, 2)).softmax(2) for q_head, k_head in heads)
    return total / (q.shape[2] // HEAD_WIDTH)


@torch.no_grad()
def record(model: Network, key: Tensor, residual: Tensor) -> Recording:
    """Run the network in eval mode on clips and keep its spikes, and its attention or modulation. It is left in the
    mode it was in.

    key [B, K, 3, H, W], residual [B, K, S, 3, H, W], as for `Network.forward`, on any device. Every LIF backend is
    recorded; a compiled network runs uncompiled.
    """
    device = next(model.parameters()).device
    key, residual = key.to(device), residual.to(device)
    spikes, queries, keys, modulation, was_training = {}, {}, {}, {}, model.training
    layers = {f"{stage}.{n}": layer for stage, group in model.lif_layers().items() for n, layer in enumerate(group, 1)}
    fusions = {f"stage{n}": fusion for n, fusion in enumerate(model.fusions, 1) if fusion is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers.items():
            # Each backend hands the spikes of a layer to `counted`, also the kernel that fires within a batch norm.
            def counted(fired: Tensor, name=name, layer=layer) -> Tensor:
                spikes[name] = (fired != 0).cpu()
                return type(layer).counted(layer, fired)

            layer.counted = counted
            stack.callback(delattr, layer, "counted")
        for stage, fusion in fusions.items():
            if not hasattr(fusion, "attend_ann"):  # no attention: what changes

                def changed(module, inputs, fused: Tensor, stage=stage) -> None:  # [S, N, C, h, w]
                    modulation[stage] = (fused.float() - inputs[0].float()).abs().mean((0, 2)).cpu()

                stack.callback(fusion.register_forward_hook(changed).remove)
                continue
            for linear, found in ((fusion.attend_ann.to_q, queries), (fusion.attend_ann.to_k, keys)):
                hook = linear.register_forward_hook(
                    lambda module, inputs, output, found=found, stage=stage: found.__setitem__(stage, output)
                )
                stack.callback(hook.remove)
        stack.callback(model.train, was_training)
        logits = model.eval()(key, residual)
    steps = residual.shape[2]
    attention = {
        stage: attention_weights(queries[stage], keys[stage]).unflatten(1, (steps, -1)).cpu() for stage in queries
    }
    return Recording(
        key.flatten(0, 1).float().cpu(), residual.flatten(0, 1).float().cpu(), logits.float().cpu(), spikes,
        attention, modulation,
    )  # fmt: skip
