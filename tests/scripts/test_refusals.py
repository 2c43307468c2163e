"""Bad input to train_fusion.py: one line, a non-zero exit, nothing lost."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import train_fusion
from dataset.index import VideoIndex
from tests.helpers.script import copy_run, full_disk, refused, run_here, run_main, small_run
from utils.checkpoint import load_checkpoint

# ---- bad input --------------------------------------------------------------------------------------


BAD_FLAGS = {
    "T": ({"-T": "6", "--stride": "4"}, r"-T must be a multiple of --stride, got T 6 and stride 4; the nearest is T 8"),
    "stride": ({"--stride": "1"}, r"--stride must be at least 2"),
    "size": ({"--size": "100"}, r"--size must be a multiple of 32, got 100; the nearest is 96"),
    "choice": ({"--dset": "hmdb52"}, r"--dset: invalid choice: 'hmdb52'.*demo.*hmdb51.*ucf101"),
    "number": ({"-b": "many"}, r"-b.*invalid int value: 'many'"),
    "unknown flag": ({"--strid": "2"}, r"unrecognized arguments: --strid"),
    "epochs": ({"--epochs": "0"}, r"--epochs must be at least 1"),
    "seed": ({"--seed": "-1"}, r"--seed must be at least 0"),
    "nan": ({"-lr": "nan"}, r"--learning-rate must be at least 0, got nan"),
    "resume and start": ({"--resume": "auto", "--start_epoch": "1"}, r"give one of the two"),
    "fraction": ({"--val-fraction": "1.5"}, r"--val-fraction must be at least 0 and below 1"),
    "lif backend": ({"--lif-backend": "cuda"}, r"--lif-backend: invalid choice: 'cuda'.*triton"),
    "device": ({"--device": "tpu"}, r"--device tpu: expected"),
    "cuda": ({"--device": "cuda:99"}, r"--device cuda:99: this machine has \d+ CUDA devices"),
    "cuda graphs": ({"--cuda-graphs": None, "--device": "cpu"}, r"--cuda-graphs needs a GPU, .* got --device cpu"),
    "data root": ({"--data-root": "/nowhere/videos"}, r"--data-root /nowhere/videos: no such folder"),
    "lists": ({"--annotation-path": "/nowhere"}, r"--annotation-path /nowhere: no such folder"),
    "split": ({"--split": "2"}, r"expected files <class>_test_split2\.txt, found none"),
    "weights": ({"--weights": "r18.pth"}, r"--weights r18\.pth: .*no such file"),
    "split of a demo": ({"--dset": "demo", "--split": "2"}, r"a demo makes its own split files|a demo has one split"),
    "precise test": (
        {"--test-only": None, "--resume": "auto", "--precise-bn": "8"},
        r"--precise-bn: --test-only tests the batch",
    ),
    "nothing to measure": (
        {"--branches": "ann", "--freeze": "ann", "--precise-bn": "8"},
        r"--precise-bn: --freeze ann with --branches ann leaves no batch norm to measure",
    ),
    "keep": ({"--keep": "0"}, r"--keep must be at least 1"),
    "minutes": ({"--checkpoint-minutes": "-1"}, r"--checkpoint-minutes must be at least 0"),
    "checkpoint": ({"--resume": "/nowhere/last.pt"}, r"/nowhere/last\.pt: no such checkpoint"),
}


@pytest.mark.parametrize("change, message", BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_flags(monkeypatch, capfd, flags, change, message):
    branches = {"--branches": "both"} if "--weights" in change else {}
    refused(monkeypatch, capfd, flags | branches | change, message)


def test_empty_class_folder(monkeypatch, capfd, flags, tmp_path):
    (tmp_path / "videos/grow").mkdir(parents=True)
    refused(
        monkeypatch, capfd, flags | {"--data-root": tmp_path / "videos"}, r"videos/grow: class folder without a video"
    )


def test_lists_that_name_nothing_on_disk(monkeypatch, capfd, flags, tmp_path):
    (tmp_path / "videos/grow").mkdir(parents=True)
    (tmp_path / "videos/grow/other.avi").write_bytes(b"")
    refused(
        monkeypatch,
        capfd,
        flags | {"--data-root": tmp_path / "videos"},
        r"--data-root \S*videos: holds none of the videos to train on of split 1",
    )


def test_a_reader_that_finds_nothing_to_train_on(monkeypatch, capfd, flags):
    from dataclasses import replace

    hmdb51 = train_fusion.DATA_SETS["hmdb51"]
    empty = replace(hmdb51, read=lambda *where: replace(hmdb51.read(*where), train=[]))
    monkeypatch.setitem(train_fusion.DATA_SETS, "hmdb51", empty)
    refused(monkeypatch, capfd, flags, r"0 training clips cannot be shared out to 1 processes")


@pytest.fixture(scope="module")
def whole(tiny_demo, tmp_path_factory) -> Path:
    """The folder of a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    run_main(small_run(tiny_demo, folder) | {"--epochs": 1})
    return folder / "run"


@pytest.fixture
def trained(whole, flags) -> Path:
    return copy_run(whole, flags["--run-dir"])


def test_truncated_checkpoint(monkeypatch, capfd, flags, trained):
    content = (trained / "last.pt").read_bytes()
    (trained / "last.pt").unlink()
    (trained / "last.pt").write_bytes(content[:50_000])
    refused(monkeypatch, capfd, flags | {"--resume": "auto"}, r"last\.pt: not a readable checkpoint")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--stride": "4"}, "its stride is 2, this run's is 4"),
        ({"--branches": "both"}, "its branches is snn, this run's is both"),
        ({"--downsample": None}, "its downsample is False, this run's is True"),
        ({"--model": "resnet34"}, "its backbone is resnet18, this run's is resnet34"),
    ],
)
def test_checkpoint_of_another_network(monkeypatch, capfd, flags, trained, change, message):
    refused(monkeypatch, capfd, flags | change | {"--resume": "auto"}, message)


def test_checkpoint_of_other_classes(monkeypatch, capfd, flags, trained, tiny_demo, tmp_path):
    for file in tiny_demo[1].glob("[g-m]*.txt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    refused(
        monkeypatch,
        capfd,
        flags | {"--annotation-path": tmp_path, "--resume": "auto"},
        "its num_classes is 8, this run's is 5",
    )


def test_a_folder_that_holds_a_run_is_not_replaced(monkeypatch, capfd, flags, trained):
    before = (trained / "last.pt").read_bytes()
    refused(monkeypatch, capfd, flags, r"holds a run already.*--resume auto.*--overwrite")
    assert (trained / "last.pt").read_bytes() == before
    assert run_here(monkeypatch, capfd, flags | {"--overwrite": None})[0] == 0


def test_a_full_disk_keeps_the_earlier_checkpoint(monkeypatch, capfd, flags, trained):
    """The write of the second checkpoint fails."""
    before = (trained / "last.pt").read_bytes()
    with full_disk(len(before) // 2):
        status, _, err = run_here(monkeypatch, capfd, flags | {"--resume": "auto", "--epochs": 3})
    assert status == 2 and re.fullmatch(r"error: .*\.pt: the checkpoint cannot be written \(.*\); .*\n", err), err
    assert (trained / "last.pt").read_bytes() == before
    assert load_checkpoint(trained / "last.pt")["position"]["epoch"] == 1
    assert not list(trained.glob(".*.tmp"))


def test_a_folder_without_write_permission(monkeypatch, capfd, flags, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # root writes anywhere: a file in the way refuses root too
        locked.rmdir()
        locked.write_text("")
    refused(monkeypatch, capfd, flags | {"--run-dir": locked / "run"}, r"--run-dir .*locked/run: cannot be written")


# ---- broken videos ----------------------------------------------------------------------------------


@pytest.fixture
def broken_copy(tiny_demo, tmp_path):
    """The tiny videos, one of them cut to nothing, one replaced by text."""
    root = shutil.copytree(tiny_demo[0], tmp_path / "videos")
    files = sorted(root.glob("*/train*.avi"))
    files[0].write_bytes(b"")
    files[5].write_bytes(b"no video" * 100)
    return root


def test_unreadable_videos_are_left_out_and_named(monkeypatch, capfd, flags, broken_copy):
    status, out, err = run_here(monkeypatch, capfd, flags | {"--data-root": broken_copy, "--epochs": 1})
    assert status == 0, err
    assert "2 videos cannot be read and are left out" in out and "training on 22 clips" in out
    named = (Path(flags["--run-dir"]) / "unreadable.txt").read_text().splitlines()
    assert len(named) == 2 and all(".avi: " in line for line in named)


def test_strict_fails_on_them(monkeypatch, capfd, flags, broken_copy):
    refused(
        monkeypatch, capfd, flags | {"--data-root": broken_copy, "--strict": None}, r"--strict: 2 videos cannot be read"
    )


@pytest.fixture
def breaks_after_indexing(monkeypatch, flags, tiny_demo, tmp_path):
    """(flags, path): a video that was in order when it was indexed, and is not now."""
    monkeypatch.setattr("dataset.video.RETRY_SECONDS", 0.0)
    root = shutil.copytree(tiny_demo[0], tmp_path / "videos")
    changed = flags | {"--data-root": root, "--epochs": 1}
    VideoIndex(tmp_path / "index/hmdb51.json").lookup(list(map(str, root.glob("*/*.avi"))), workers=2)
    victim = sorted(root.glob("*/train*.avi"))[3]
    stat, size = victim.stat(), victim.stat().st_size
    victim.write_bytes(b"\0" * size)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the index cannot know
    return changed, victim


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_that_breaks_after_indexing_is_left_out(monkeypatch, capfd, breaks_after_indexing, workers):
    changed, victim = breaks_after_indexing
    status, _, err = run_here(monkeypatch, capfd, changed | {"-j": workers, "--epochs": 2})
    assert status == 0 and re.fullmatch(rf"warning: left out: {re.escape(str(victim))}: .*\n", err), err
    run = Path(changed["--run-dir"])
    assert (run / "broken.txt").read_text().startswith(f"{victim}: ")
    assert load_checkpoint(run / "last.pt")["position"]["epoch"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_stops_at_it_and_keeps_what_is_trained(monkeypatch, capfd, breaks_after_indexing, workers):
    changed, victim = breaks_after_indexing
    refused(monkeypatch, capfd, changed | {"-j": workers, "--strict": None}, re.escape(str(victim)))
    assert load_checkpoint(Path(changed["--run-dir"]) / "last.pt")["position"]["clips"] % 5 == 0


def test_a_run_that_loses_its_output_saves_and_ends(monkeypatch, capfd, flags):
    """As `| head` does to it, or the death of `| tee`."""
    videos = list(map(str, Path(flags["--data-root"]).glob("*/*.avi")))
    VideoIndex(Path(flags["--index-dir"]) / "hmdb51.json").lookup(videos, workers=2)  # a fork flushes
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w") as nobody:
        patch.setattr(sys, "stdout", nobody)
        status, _, err = run_here(patch, capfd, flags | {"--epochs": 3})
    assert status == 128 + signal.SIGPIPE
    assert err == "standard output cannot be written (Broken pipe): finishing the step in hand, then saving\n"
    # The line of the first epoch is the first that cannot be written.
    position = load_checkpoint(Path(flags["--run-dir"]) / "last.pt")["position"]
    assert (position["epoch"], position["clips"]) == (1, 0)
    status, out, err = run_here(monkeypatch, capfd, flags | {"--epochs": 2, "--resume": "auto"})
    assert status == 0 and "resumed from" in out, err


def test_non_finite_loss_names_videos_and_saves(monkeypatch, capfd, flags):
    status, _, err = run_here(monkeypatch, capfd, flags | {"-lr": "1e30", "--no-amp": None})
    assert status == 2 and err.count("\n") == 1
    assert re.search(r"epoch \d+, the loss became (nan|inf); videos of that batch: .*\.avi", err), err
    assert (Path(flags["--run-dir"]) / "nonfinite.pt").is_file()


def test_kernels_that_cannot_run_here_are_refused(monkeypatch, capfd, flags):
    monkeypatch.setattr("utils.triton_language._interpreted", lambda: False)
    refused(
        monkeypatch, capfd, flags | {"--device": "cpu", "--lif-backend": "triton"}, r"--lif-backend triton: .*on a GPU"
    )


@pytest.mark.parametrize("more", [{"--lif-backend": "spikingjelly"}, {"--pack-spikes": None, "--deterministic": None}])
def test_other_ways_to_compute_train_too(monkeypatch, capfd, flags, more):
    try:
        assert run_here(monkeypatch, capfd, flags | more | {"--epochs": 1})[0] == 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiling_without_a_compiler_is_one_line(monkeypatch, capfd, flags, tmp_path):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    small = {"--branches": "ann", "--epochs": "1", "--no-amp": None, "--compile": None}
    status, _, err = run_here(monkeypatch, capfd, flags | small)
    assert status == 2 and re.search(r"^error: --compile failed \(.*\); is a C\+\+ compiler installed\?", err, re.M), (
        err
    )
    assert "Traceback" not in err
