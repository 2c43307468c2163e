"""What the tests share: real clips where they are at hand, and a small generated data set."""

import os
from pathlib import Path

import pytest
import torch

from dataset.demo import DemoSettings, generate_demo

# Real HMDB-51, UCF-101, Kinetics and awkward files with `frames.json`, and the official split files.
SHARED = Path(os.environ.get("RESPIKE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def clips() -> Path:
    if not (SHARED / "clips" / "frames.json").is_file():
        pytest.skip(
            f"no real clips at {SHARED / 'clips'}; set RESPIKE_SHARED to the folder that holds clips/ and splits/"
        )
    return SHARED / "clips"


@pytest.fixture(scope="session")
def splits() -> Path:
    if not (SHARED / "splits").is_dir():
        pytest.skip(
            f"no split files at {SHARED / 'splits'}; set RESPIKE_SHARED to the folder that holds clips/ and splits/"
        )
    return SHARED / "splits"


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory) -> tuple[Path, Path]:
    """(data_root, annotation_path): 8 classes x (3 training + 1 test) videos of 10 frames, 40 pixels."""
    settings = DemoSettings(train_videos_per_class=3, test_videos_per_class=1, frames=10, side_pixels=40)
    return generate_demo(tmp_path_factory.mktemp("tiny_demo"), settings, workers=2)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
