"""What the tests share: real clips where they are at hand, and a small generated data set."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which must be said before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from dataset.demo import DemoSettings, generate_demo
from tests.helpers.prediction import export_random_network
from tests.helpers.script import small_run
from utils.trained import TrainedNetwork

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


@pytest.fixture(scope="module")
def one_thread():
    """With so little to do, threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory) -> tuple[Path, Path]:
    """(data_root, annotation_path): 8 classes x (3 training + 1 test) videos of 10 frames, 40 pixels."""
    settings = DemoSettings(train_videos_per_class=3, test_videos_per_class=1, frames=10, side_pixels=40)
    return generate_demo(tmp_path_factory.mktemp("tiny_demo"), settings, workers=2)


@pytest.fixture(scope="session")
def tiny_lists(tiny_demo) -> dict:
    """Flags of train_kinetics.py: the same videos as lists."""
    folder = tiny_demo[0].parent
    return {"--dset": "list", "--train-list": folder / "train.txt", "--val-list": folder / "val.txt"}


@pytest.fixture(scope="session")
def tiny_videos(tiny_demo) -> list[Path]:
    """Four of its videos."""
    return sorted(tiny_demo[0].rglob("test*.avi"))[:4]


@pytest.fixture(scope="session")
def random_network(tmp_path_factory) -> TrainedNetwork:
    """A network that predict.py takes."""
    return export_random_network(tmp_path_factory.mktemp("random_network") / "network.safetensors")


@pytest.fixture
def open_folder():
    """A folder that every user may look into, as `tmp_path` is not; for tests of permissions."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def flags(tiny_demo, tmp_path):
    """Flags of train_fusion.py: a run of a tiny network on 24 tiny videos."""
    return small_run(tiny_demo, tmp_path)


@pytest.fixture
def wide_programs(monkeypatch):
    """Fewer and wider programs: Triton's interpreter takes as long for a narrow one. For whole networks; the tests of
    the kernels have the programs that a GPU runs."""
    from models.kernels import geglu, triton_batch_norm

    if not torch.cuda.is_available():
        monkeypatch.setattr(triton_batch_norm, "WARPS", 64)
        monkeypatch.setattr(geglu, "_BLOCK", 2**15)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
