import numpy
import pytest
import torch

from dataset.decode import VideoError, decode_frames
from dataset.index import VideoInfo, probe
from dataset.records import read_hmdb51
from dataset.transforms import test_transform as centre_transform
from dataset.transforms import train_transform
from dataset.video import EpochSampler, VideoDataset, count_looped, every_clip, make_loader, random_clips, spread_clips


@pytest.fixture(scope="module")
def videos(tiny_demo):
    records = read_hmdb51(*tiny_demo, split=1).train
    return records, [probe(record.path) for record in records]


def make_dataset(videos, seed=0, frames=8, size=32, train=True):
    records, infos = videos
    clips = random_clips(records) if train else spread_clips(infos, frames, 1, 1)
    transform = train_transform(size, flip=True) if train else centre_transform(size)
    return VideoDataset(records, infos, clips, frames, 1, transform, seed)


def epoch_of(loader, epoch, start=0):
    loader.sampler.set_epoch(epoch, start)
    return list(loader)


def test_items(videos):
    dataset = make_dataset(videos)
    clip, label, video = dataset[0, 5]
    assert clip.shape == (8, 3, 32, 32) and clip.dtype == torch.uint8
    assert label == videos[0][5].label and video == 5


def test_test_clip_is_the_centred_window(videos):
    clip, _, _ = make_dataset(videos, train=False, size=40)[0, 3]
    want = decode_frames(videos[0][3].path, range(1, 9))
    assert torch.equal(clip.permute(0, 2, 3, 1), torch.from_numpy(want))  # 40 pixels in, 40 out: untouched


def test_batches_do_not_depend_on_the_number_of_workers(videos):
    results = []
    for workers in (0, 1, 3):
        loader = make_loader(make_dataset(videos), 5, workers, shuffle=True, seed=0, pin=False)
        results.append(epoch_of(loader, 2) + epoch_of(loader, 3))
    for other in results[1:]:
        assert len(other) == len(results[0])
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_epochs_and_seeds_differ(videos):
    dataset, other_seed = make_dataset(videos), make_dataset(videos, seed=1)
    assert torch.equal(dataset[0, 1][0], dataset[0, 1][0])
    assert not torch.equal(dataset[0, 1][0], dataset[1, 1][0])
    assert not torch.equal(dataset[0, 1][0], other_seed[0, 1][0])
    orders = {tuple(EpochSampler.__iter__(sampler(epoch))) for epoch in range(3)}
    assert len({tuple(index for _, index in order) for order in orders}) == 3


def sampler(epoch, start=0):
    sampler = EpochSampler(20, shuffle=True, seed=7)
    sampler.set_epoch(epoch, start)
    return sampler


def test_sampler_goes_on_where_it_was():
    assert list(sampler(4, 13)) == list(sampler(4))[13:] and len(sampler(4, 13)) == 7
    assert sorted(index for _, index in sampler(4)) == list(range(20))


def test_loading_leaves_the_global_generator_alone(videos):
    state = torch.get_rng_state()
    make_dataset(videos)[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_one_crop_and_one_flip_for_the_whole_clip():
    """Identical frames stay identical: whatever is drawn is drawn once."""
    frame = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8)
    for _ in range(5):
        clip = train_transform(32, flip=True)(frame.expand(6, 3, 40, 60))
        assert clip.shape == (6, 3, 32, 32) and all(torch.equal(clip[0], other) for other in clip)


def test_flip_follows_the_data_set():
    frame = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64)
    unflipped = [train_transform(64, flip=False, crop_area=(1.0, 1.0))(frame) for _ in range(20)]
    assert all(clip[0, 0, 0, 0] < clip[0, 0, 0, -1] for clip in unflipped)
    flipped = [train_transform(64, flip=True, crop_area=(1.0, 1.0))(frame) for _ in range(20)]
    assert {bool(clip[0, 0, 0, 0] < clip[0, 0, 0, -1]) for clip in flipped} == {True, False}


def test_centre_transform_keeps_the_middle():
    clip = torch.zeros(2, 3, 32, 64, dtype=torch.uint8)
    clip[..., 16:48] = 200
    assert torch.equal(centre_transform(32)(clip), torch.full((2, 3, 32, 32), 200, dtype=torch.uint8))


def test_clip_choices():
    infos = [VideoInfo(frames=48), VideoInfo(frames=10)]
    assert [tuple(clip) for clip in every_clip(infos, 16, 1, 16)] == [(0, 0), (0, 16), (0, 32), (1, 0)]
    assert [tuple(clip) for clip in spread_clips(infos, 16, 1, 2)] == [(0, 0), (0, 32), (1, 0), (1, 0)]
    assert [tuple(clip) for clip in random_clips([object(), object()])] == [(0, None), (1, None)]
    assert count_looped(infos, 16, 1) == 1 and count_looped(infos, 16, 4) == 2


def test_a_video_that_breaks_later_is_named(videos, tmp_path):
    records, infos = videos
    path = tmp_path / "gone.avi"
    record = records[0].__class__(str(path), 0, "g")
    dataset = VideoDataset([record], infos[:1], random_clips([record]), 8, 1, centre_transform(32), 0)
    with pytest.raises(VideoError, match=r"gone\.avi: no such file"):
        dataset[0, 0]


def test_batch_is_uint8_and_labels_match(videos):
    loader = make_loader(make_dataset(videos), 7, 0, shuffle=False, seed=0, pin=False)
    batches = epoch_of(loader, 0)
    assert [len(batch.labels) for batch in batches] == [7, 7, 7, 3]
    assert batches[0].clips.shape == (7, 8, 3, 32, 32) and batches[0].clips.dtype == torch.uint8
    labels = numpy.array([record.label for record in videos[0]])
    for batch in batches:
        assert batch.labels.tolist() == labels[batch.videos].tolist()
