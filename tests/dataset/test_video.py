import errno
import os

import numpy
import pytest
import torch

import dataset.video
from dataset.batch_sampler import EvalBatchSampler, TrainBatchSampler
from dataset.clips import NO_VIDEO, VideoTable, eval_clips, random_clips
from dataset.decode import VideoError, decode_frames
from dataset.frame_sampling import SegmentSampling, WindowSampling
from dataset.index import probe
from dataset.splits import read_hmdb51
from dataset.transforms import eval_transforms, resized_crop
from dataset.video import FailedVideo, VideoDataset, collate, make_loader
from tests.helpers.script import memory_limit
from utils.errors import UserError

WINDOW = WindowSampling(8)


@pytest.fixture(scope="module")
def videos(tiny_demo) -> VideoTable:
    records = read_hmdb51(*tiny_demo, split=1).train
    return VideoTable(records, [probe(record.path) for record in records])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(dataset.video, "RETRY_SECONDS", 0.0)


def training(videos, seed=0, sampling=WINDOW, **more):
    return VideoDataset(videos, random_clips(videos), sampling, [resized_crop(32, flip=True)], seed, **more)


def held_out(videos, sampling=WINDOW, size=40, crops=1):
    transforms = eval_transforms(size, size, crops)
    return VideoDataset(videos, eval_clips(videos, sampling, crops), sampling, transforms, 0)


def batches_of(videos, workers, epochs=(2, 3), batch_size=5):
    data = training(videos)
    loader = make_loader(data, TrainBatchSampler(len(data), batch_size, seed=0), workers, pin=False)
    batches = []
    for epoch in epochs:
        loader.batch_sampler.set_position(epoch)
        batches += list(loader)
    return batches


def test_items(videos):
    clip, label, video = training(videos)[0, 5]
    assert clip.shape == (8, 3, 32, 32) and clip.dtype == torch.uint8
    assert label == videos.labels[5] and video == 5


def test_a_clip_that_cannot_be_scaled_in_memory_is_a_failed_video(videos):
    """A video of few rows and many columns becomes huge where its short side is enlarged."""
    data, wide = held_out(videos), numpy.zeros((8, 2, 4000, 3), dtype=numpy.uint8)
    data._decode = lambda *_: wide
    data._transforms = [eval_transforms(256, 256)[0]]
    with memory_limit(300_000_000):
        failed = data[0, 3]
    assert failed == FailedVideo(3, f"{videos.path(3)}: a clip of 4000 x 2 pixels needs more memory than there is")
    data._strict = True
    with memory_limit(300_000_000), pytest.raises(VideoError, match="a clip of 4000 x 2 pixels needs more memory"):
        data[0, 3]


def test_test_clip_is_the_centred_window(videos):
    clip, _, _ = held_out(videos)[0, 3]
    want = decode_frames(videos.path(3), range(1, 9))
    assert torch.equal(clip.permute(0, 2, 3, 1), torch.from_numpy(want))  # 40 pixels in, 40 out: untouched


def test_test_clip_of_segments_is_the_middle_of_each(videos):
    clip, _, _ = held_out(videos, SegmentSampling(5))[0, 3]
    want = decode_frames(videos.path(3), [1, 3, 5, 7, 9])
    assert torch.equal(clip.permute(0, 2, 3, 1), torch.from_numpy(want))


def test_crops_of_a_view_are_decoded_once(videos, monkeypatch):
    decoded = []
    original = dataset.video.decode_frames
    monkeypatch.setattr(
        dataset.video, "decode_frames", lambda path, *more: decoded.append(path) or original(path, *more)
    )
    data = held_out(videos, SegmentSampling(4, views=2), crops=3)
    clips = [data[0, number][0] for number in range(12)]  # two videos, two views, three crops
    assert decoded == [videos.path(0)] * 2 + [videos.path(1)] * 2
    one_crop = held_out(videos, SegmentSampling(4, views=2))
    assert torch.equal(clips[4], one_crop[0, 1][0]) and torch.equal(clips[10], one_crop[0, 3][0])


def test_batches_do_not_depend_on_the_number_of_workers(videos):
    results = [batches_of(videos, workers) for workers in (0, 1, 3)]
    for other in results[1:]:
        assert len(other) == len(results[0])
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_epochs_and_seeds_differ(videos):
    data, other_seed = training(videos), training(videos, seed=1)
    assert torch.equal(data[0, 1][0], data[0, 1][0])
    assert not torch.equal(data[0, 1][0], data[1, 1][0])
    assert not torch.equal(data[0, 1][0], other_seed[0, 1][0])


def test_loading_leaves_the_global_generator_alone(videos):
    state = torch.get_rng_state()
    training(videos)[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_static_video_has_no_residuals(tmp_path):
    """The published code normalised Kinetics clips along the wrong axis: its residuals were not zero."""
    import av

    from dataset.residual import key_residual_split
    from dataset.splits import VideoRecord
    from dataset.transforms import multi_scale_crop

    path = str(tmp_path / "static.mkv")
    frame = numpy.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=numpy.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    table = VideoTable([VideoRecord(path, 0, "")], [probe(path)])
    sampling = SegmentSampling(8)
    data = VideoDataset(table, random_clips(table), sampling, [multi_scale_crop(32, flip=True)], 0)
    for epoch in range(5):
        _, residual = key_residual_split(data[epoch, 0][0][None], stride=4)
        assert torch.count_nonzero(residual) == 0


# ---- videos that break ------------------------------------------------------------------------------


@pytest.fixture
def breakable(tiny_demo, tmp_path) -> VideoTable:
    import shutil

    root = shutil.copytree(tiny_demo[0], tmp_path / "videos")
    records = read_hmdb51(root, tiny_demo[1], split=1).train
    return VideoTable(records, [probe(record.path) for record in records])


def test_a_video_that_breaks_later_is_named_and_left_out(breakable):
    from pathlib import Path

    Path(breakable.path(2)).unlink()
    data = training(breakable)
    failed = data[0, 2]
    assert isinstance(failed, FailedVideo) and failed.video == 2
    assert failed.error == f"{breakable.path(2)}: no such file (only local video files are opened)"
    batch = collate([data[0, 1], failed, data[0, 3]])
    assert batch.videos.tolist() == [1, 3] and batch.failed == [failed]
    assert len(collate([failed]).labels) == 0 and collate([failed]).clips.shape[0] == 0
    with pytest.raises(VideoError, match="no such file"):
        training(breakable, strict=True)[0, 2]


def test_a_hiccup_is_retried_once(videos, monkeypatch):
    calls = []
    original = dataset.video.decode_frames

    def failing(times):
        def decode(*arguments):
            calls.append(arguments)
            if len(calls) <= times:
                raise VideoError("x.avi: Input/output error")
            return original(*arguments)

        return decode

    want = training(videos)[0, 0][0]
    monkeypatch.setattr(dataset.video, "decode_frames", failing(1))
    assert torch.equal(training(videos)[0, 0][0], want) and len(calls) == 2
    calls.clear()
    monkeypatch.setattr(dataset.video, "decode_frames", failing(2))
    assert training(videos)[0, 0] == FailedVideo(0, "x.avi: Input/output error") and len(calls) == 2


def test_places_of_videos_that_are_gone_stay_empty(videos):
    clips = random_clips(videos)
    clips["video"][4] = NO_VIDEO
    data = VideoDataset(videos, clips, WINDOW, [resized_crop(32, flip=True)], 0)
    assert data[0, 4] == FailedVideo(NO_VIDEO, "")
    assert torch.equal(data[0, 5][0], training(videos)[0, 5][0])  # the others are what they were


def test_batch_is_uint8_and_labels_match(videos):
    data = held_out(videos, size=32)
    batches = list(make_loader(data, EvalBatchSampler(data.clips, 7), workers=0, pin=False))
    assert [len(batch.labels) for batch in batches] == [7, 7, 7, 3]
    assert batches[0].clips.shape == (7, 8, 3, 32, 32) and batches[0].clips.dtype == torch.uint8
    for batch in batches:
        assert batch.labels.tolist() == videos.labels[batch.videos].tolist()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOENT])
def test_workers_without_a_place_for_semaphores_are_refused(videos, monkeypatch, number):
    def refuse(self, *arguments, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    data = training(videos)
    batches = TrainBatchSampler(len(data), 5, seed=0)
    with pytest.raises(UserError, match=rf"/dev/shm that can be written \({os.strerror(number)}\).*-j 0"):
        make_loader(data, batches, workers=2, pin=False)
    assert len(list(make_loader(data, batches, workers=0, pin=False))) == len(batches)
