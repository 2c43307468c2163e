"""ReSpike: key frames into a ResNet, residual frames into a spiking ResNet, fused stage by stage."""

import functools

import torch
from torch import Tensor, nn

from models.attention import CrossAttentionFusion, LeanFusion
from models.batch_norm import BATCH_NORMS, StepBatchNorm2d, fit_running
from models.film import FilmFusion
from models.kernels.parameters import LIFParameters
from models.network import Network
from models.neurons import BACKENDS, LIF
from models.published_weights import rename_published_state_dict
from models.resnet import ResNetStages
from models.spiking_resnet import SpikingResNetStages
from models.spikingjelly_neurons import neuron_factory
from utils.errors import UserError

BRANCHES = ("both", "ann", "snn")
# Name -> the block of each fused stage, made of (channels, channels of the ANN, pool). None: there is no block.
FUSIONS = {"cross": CrossAttentionFusion, "film": FilmFusion, "lean": LeanFusion, "concat": None}
SETTINGS = (
    "backbone",
    "num_classes",
    "stride",
    "downsample",
    "branches",
    "fusion",
    "snn_batch_norm",
)  # in a checkpoint
SIZE_MULTIPLE = 32  # pixels: five halvings
DOWNSAMPLE_POOLS = (4, 2, 1, 1)  # --downsample: how far each stage is pooled before it is fused


class ReSpike(Network):
    """Residual-frame hybrid network for action recognition (arXiv 2409.01564).

    forward: key [B, K, 3, H, W] and residual [B, K, stride-1, 3, H, W], both normalised, as
    `dataset.residual.key_residual_split` makes them -> logits [B, num_classes]. H and W are
    multiples of 32. Channels of zeros may follow the 3 colours (`models.colours`).

    backbone: resnet18, 34, 50, 101 or 152.
    num_classes: logits per clip.
    stride: frames per segment, one of them the key frame.
    downsample: fuse at all four stages, the first two pooled by 4 and 2; else at stages 2, 3 and 4 at full size.
    weights: ImageNet weights of the ANN branch (`models.resnet.load_weights`).
    branches: "both", or "ann" or "snn" for that branch alone.
    fusion: "cross" (attention, as published), "film" (gain and shift by place), "lean" (attention at a small part of
        its cost), or "concat" to join the branches at the head only.
    snn_batch_norm: "per-step" (as published), "merged" or "through-time" (`models.batch_norm.StepBatchNorm2d`).
    neuron: the equations of the spiking neurons.
    neuron_type: their class, a name in `models.neurons.NEURONS` or sj.NAME of SpikingJelly.
    neuron_args: keyword arguments of a neuron of SpikingJelly (`models.spikingjelly_neurons`).
    lif_backend: which code runs them and the batch norms, as `models.neurons.lif`.
    pack_spikes: keep one bit a spike for the backward pass (`models.kernels.packing`).

    Raises UserError for a setting that is none of these.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 51,
        stride: int = 4,
        downsample: bool = True,
        weights: str | None = None,
        branches: str = "both",
        fusion: str = "cross",
        snn_batch_norm: str = "per-step",
        neuron: LIFParameters = LIFParameters(),
        neuron_type: str = "lif",
        neuron_args: dict | None = None,
        lif_backend: str = "auto",
        pack_spikes: bool = False,
    ):
        super().__init__()
        if stride < 2:
            raise UserError(f"stride must be at least 2 (one key frame and a residual frame), got {stride}")
        if num_classes < 1:
            raise UserError(f"num_classes must be at least 1, got {num_classes}")
        for name, value, choices in (
            ("branches", branches, BRANCHES),
            ("fusion", fusion, FUSIONS),
            ("snn_batch_norm", snn_batch_norm, BATCH_NORMS),
            ("lif_backend", lif_backend, BACKENDS),
        ):
            if value not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if lif_backend == "spikingjelly" and neuron.surrogate not in ("atan", "sigmoid"):
            raise UserError(f"lif_backend spikingjelly has no surrogate {neuron.surrogate}; take auto or reference")
        if pack_spikes and neuron_type != "lif":
            raise UserError(f"pack_spikes keeps spikes of 0 and 1, as those of lif; got neuron_type {neuron_type!r}")
        make_neuron = neuron_factory(neuron_type, neuron, lif_backend, neuron_args, steps=stride - 1)
        self.stride = stride
        self.downsample = downsample
        self.ann = ResNetStages(backbone, weights, lif_backend) if branches != "snn" else None
        self.snn = None
        if branches != "ann":
            self.snn = SpikingResNetStages(
                neuron=make_neuron,
                norm=functools.partial(StepBatchNorm2d, mode=snn_batch_norm, backend=lif_backend, steps=stride - 1),
                pack_spikes=pack_spikes,
            )
        self.fusions = nn.ModuleList([None] * 4)
        if branches == "both" and (block := FUSIONS[fusion]) is not None:
            for stage in range(0 if downsample else 1, 4):
                pool = DOWNSAMPLE_POOLS[stage] if downsample else 1
                self.fusions[stage] = block(self.snn.channels[stage], self.ann.channels[stage], pool)
        width = sum(branch.channels[-1] for branch in (self.ann, self.snn) if branch is not None)
        self.head = nn.Linear(width, num_classes)
        self._frozen = False

    @classmethod
    def from_settings(cls, settings: dict, lif_backend: str) -> "ReSpike":
        return cls(
            **{name: settings[name] for name in SETTINGS}, neuron_type=settings["neuron"],
            neuron_args=settings.get("neuron_args"), lif_backend=lif_backend,
            neuron=LIFParameters(**{name: settings[name] for name in ("tau", "surrogate", "alpha")}),
        )  # fmt: skip

    def freeze_ann(self) -> None:
        """Training changes neither the weights nor the running statistics of the ANN branch."""
        self._frozen = True
        self.ann.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ReSpike":
        super().train(mode)
        if self._frozen:
            self.ann.eval()
        return self

    def forward(self, key: Tensor, residual: Tensor) -> Tensor:
        self._check_shapes(key, residual)
        batch, key_frames = key.shape[:2]
        ann = snn = None
        if self.ann is not None:
            ann = self.ann.stem(key.flatten(0, 1))  # [B*K, 64, H/4, W/4]
        if self.snn is not None:
            residual = residual.movedim(2, 0).flatten(1, 2)  # [S, B*K, 3, H, W]
            snn, spikes = self.snn.stem(residual, self._neuron_after(0))
            # snn [S, B*K, 64, H/4, W/4], pooled for the first shortcut; spikes [S, B*K, 64, H/2, W/2]

        for stage, fusion in enumerate(self.fusions):
            if ann is not None:
                ann = self.ann.stages[stage](ann)  # [B*K, C_ann, H', W']
            if snn is not None:
                # Behind a fusion block the neurons take its result, so the stage itself fires none.
                next_neuron = None if fusion is not None else self._neuron_after(stage + 1)
                snn, spikes = self.snn.stages[stage](snn, spikes, next_neuron)  # [S, B*K, C, H', W'] both
            if fusion is not None:
                snn, spikes = fusion(snn, ann), None

        pooled = []  # channels moved last, so that the gradients lie in memory as the features do
        if ann is not None:
            pooled.append(ann.movedim(1, -1).mean((1, 2)))  # [B*K, C_ann]
        if snn is not None:
            pooled.append(snn.movedim(2, -1).mean((0, 2, 3)))  # [B*K, C]
        logits = self.head(torch.cat(pooled, dim=1))  # [B*K, classes]
        return logits.unflatten(0, (batch, key_frames)).mean(1)

    def _neuron_after(self, stage: int) -> LIF | None:
        """The neurons that take the input of a stage; None behind the last stage."""
        return self.snn.stages[stage][0].lif1 if stage < 4 else None

    def _check_shapes(self, key: Tensor, residual: Tensor) -> None:
        steps = self.stride - 1
        if key.dim() != 5 or key.shape[2] < 3:
            raise ValueError(f"key frames must be [B, K, 3, H, W], got {list(key.shape)}")
        expected = [*key.shape[:2], steps, *key.shape[2:]]
        if list(residual.shape) != expected:
            raise ValueError(f"residual frames must be {expected} for stride {self.stride}, got {list(residual.shape)}")
        if key.shape[3] % SIZE_MULTIPLE or key.shape[4] % SIZE_MULTIPLE:
            raise ValueError(
                f"height and width must be multiples of {SIZE_MULTIPLE}, got {key.shape[3]} x {key.shape[4]}"
            )
        if self.training and key[:, :, 0].numel() == SIZE_MULTIPLE**2:
            raise ValueError(
                f"batch norm cannot be trained on one key frame of {SIZE_MULTIPLE} x {SIZE_MULTIPLE} pixels alone; "
                "take a larger batch, more key frames or a larger size"
            )

    def lif_layers(self) -> dict[str, list[LIF]]:
        """The LIF layers of each stage in forward order: {"stage1": [...], ...}; empty without an SNN."""
        if self.snn is None:
            return {}
        return {
            f"stage{number}": [neuron for block in stage for neuron in (block.lif1, block.lif2)]
            for number, stage in enumerate(self.snn.stages, start=1)
        }

    def load_reference_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights saved by the published code, by its names (`models.published_weights`).

        Both published variants save the same names; `fusion1` is unused, and not loaded, without
        downsample. Raises UserError with the first key that is missing, unknown or misshapen.
        """
        weights = rename_published_state_dict(state_dict, self)
        fit_running(weights, self.state_dict())
        self.load_state_dict(weights)
