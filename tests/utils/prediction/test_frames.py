"""Frame by frame, from the pictures of a video to probabilities."""

import pytest
import torch

from dataset.decode import decode_frames
from dataset.residual import RESIDUALS, key_residual_split
from models import ReSpike
from tests.helpers.prediction import variant
from utils.prediction.clips import Clips
from utils.prediction.frames import FrameByFrame
from utils.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("minus", RESIDUALS)
def test_frame_by_frame_ends_as_the_whole_clip(random_network, tiny_videos, tmp_path, minus):
    checkpoint = variant(random_network, tmp_path / "network.safetensors", settings={"residual": minus})
    model = ReSpike.from_checkpoint(checkpoint)
    shown = FrameByFrame(model, Runtime())
    frames = Clips(model.trained).centre(decode_frames(tiny_videos[0], (0, 2, 4, 6)))
    for frame in frames:
        judged = shown.show(frame)
    with torch.no_grad():
        offline = model(*key_residual_split(frames[None], 2, minus=minus))[0].double().softmax(0)
    torch.testing.assert_close(judged.probabilities, offline, rtol=0, atol=1e-5)
