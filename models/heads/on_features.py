"""A head on the features of a frozen CNN, or on frames with the CNN trained along."""

from torch import Tensor, nn

from models.heads.cnn import FrameCNN


class OnFeatures(nn.Module):
    """Features [T, B, width] -> logits [T * steps_per_frame, B, classes].

    head: [T, B, width] -> [T, B, classes].
    steps_per_frame: time steps for which the head sees each frame.
    mean, deviation: [width], of the training features. The head sees features standardised with them.
    """

    def __init__(self, head: nn.Module, steps_per_frame: int, mean: Tensor, deviation: Tensor):
        super().__init__()
        self.head, self.steps_per_frame = head, steps_per_frame
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, features: Tensor) -> Tensor:
        features = (features - self.mean) / self.deviation
        return self.head(features.repeat_interleave(self.steps_per_frame, dim=0))


class OnFrames(OnFeatures):
    """Normalised clips [B, T, 3, H, W] -> logits [T * steps_per_frame, B, classes]. The CNN is trained along."""

    def __init__(self, cnn: FrameCNN, head: nn.Module, steps_per_frame: int, mean: Tensor, deviation: Tensor):
        super().__init__(head, steps_per_frame, mean, deviation)
        self.cnn = cnn.requires_grad_(True)

    def forward(self, clips: Tensor) -> Tensor:
        features = self.cnn(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])  # [B, T, width]
        return super().forward(features.transpose(0, 1))
