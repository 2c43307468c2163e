"""What the pictures of a network are made of."""

import torch

from tests.utils.pictures.test_recording import clips, network
from utils.figures import as_image
from utils.pictures.network import firing_rate_figure, fusion_figure, key_residual_picture, raster_figure
from utils.pictures.recording import record


def test_clips_of_a_network_that_sees_every_frame():
    picture = key_residual_picture(torch.randn(2, 5, 3, 8, 8), torch.empty(2, 5, 0, 3, 8, 8))
    assert picture.shape[2] == 5 * (8 + 1) + 1 and 0 <= picture.min() < picture.max() <= 1


def test_pictures_of_a_clip():
    recording = record(network(), *clips())
    rates = firing_rate_figure(recording)
    assert torch.tensor(rates.axes[0].images[0].get_array()).allclose(100 * recording.firing_rates())
    raster = raster_figure(recording, clip=1)
    chosen = raster.axes[0].collections[0].get_offsets()
    assert len(chosen) > 0 and set(chosen[:, 0]) <= set(range(6)) and chosen[:, 1].max() < 16 * 40
    attention = fusion_figure(recording, rows=[0, 2], title="two")
    assert len(attention.axes) == 2 * (1 + 3 + 4) + 1  # and the colour bar
    for figure in (rates, raster, attention):
        image = as_image(figure)
        assert image.shape[0] == 3 and 0 <= image.min() < image.max() == 1
    assert len(fusion_figure(record(network(branches="snn"), *clips())).axes) == 4 * 4  # no map
    film = record(network(fusion="film"), *clips(batch=1))
    assert len(fusion_figure(film, rows=[0]).axes) == 1 + 3 + 4 + 1
