"""Pictures are shown as FFmpeg's own player shows them."""

import av
import numpy
import pytest

from dataset.convert import Settings, convert
from dataset.decode import decode_frames, every_frame
from dataset.index import VideoIndex, probe
from dataset.orientation import Orientation
from tests.helpers.odd_videos import MATRICES, corners_of, four_corners, set_matrix


def write(path, codec, matrix, frames=3):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(four_corners(), format="rgb24")))
        container.mux(stream.encode(None))
    set_matrix(path, matrix)
    return path


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mov", "mjpeg")])
def test_all_eight_orientations(tmp_path, matrix, name, codec):
    path = write(tmp_path / name, codec, matrix)
    frames = decode_frames(path, [2, 0])
    shape = (64, 48, 3) if matrix[0] == 0 else (48, 64, 3)
    assert frames.shape == (2, *shape)
    assert [corners_of(frame) for frame in (*frames, *every_frame(path))] == [MATRICES[matrix]] * 5
    for info in (probe(path), VideoIndex(None).lookup([str(path)], workers=1)[str(path)]):
        assert (info.height, info.width) == shape[:2]
    convert(str(path), tmp_path / "prepared.mov", Settings())
    assert corners_of(decode_frames(tmp_path / "prepared.mov", [1])[0]) == MATRICES[matrix]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("upside_down", [False, True])
def test_an_upright_picture_has_the_upright_size(transposed, mirrored, upside_down):
    orientation = Orientation(transposed, mirrored, upside_down)
    picture = numpy.arange(2 * 3 * 3).reshape(2, 3, 3)
    upright = orientation.upright(picture)
    assert upright.shape[:2] == ((3, 2) if transposed else (2, 3))
    assert sorted(upright.reshape(-1, 3).tolist()) == picture.reshape(-1, 3).tolist()
