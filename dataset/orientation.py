"""How a file wants its pictures shown: as stored, turned by quarters, mirrored, or both."""

from typing import NamedTuple

import av
import numpy


class Orientation(NamedTuple):
    """What makes a stored picture upright, in this order."""

    transposed: bool = False  # rows become columns
    mirrored: bool = False  # left to right
    upside_down: bool = False  # top to bottom

    def upright(self, picture: numpy.ndarray) -> numpy.ndarray:
        """A view of the picture [H, W, 3], upright."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        if self.mirrored:
            picture = picture[:, ::-1]
        return picture[::-1] if self.upside_down else picture


# By quarter turns, counter-clockwise.
_TURNS = (
    Orientation(),
    Orientation(transposed=True, upside_down=True),
    Orientation(mirrored=True, upside_down=True),
    Orientation(transposed=True, mirrored=True),
)


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """The nearest of the eight orientations to the frame's display matrix (ISO/IEC 14496-12, 6.2.2; AVDisplayMatrix
    in FFmpeg): a stored point (x, y), y down, is shown at (a x + c y, b x + d y). Scaling is ignored."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives none of a frame's side data if one is of a kind that it does not know, such as EXIF
        return _TURNS[round(frame.rotation / 90) % 4]
    if matrix is None:
        return Orientation()
    a, b, _, c, d = numpy.frombuffer(matrix, dtype=numpy.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)
