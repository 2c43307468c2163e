"""Opening a local video file with FFmpeg, and nothing that such a file may name."""

import contextlib
import gc
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import av

from utils.errors import UserError

# Damaged files make FFmpeg talk; what matters is raised, counted or written to the run folder.
av.logging.set_level(av.logging.PANIC)
# A forked process leaves alone what it inherits. If its garbage collector freed a codec that has threads, FFmpeg would
# wait for ever: the threads are in the other process. (Our decoders have none; other users of PyAV in a process may.)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)

# Containers of video data sets. Playlists (hls, concat, dash, image sequences, sdp ...) stay out: they
# name other files or addresses, and FFmpeg recognises them by content, whatever the file is called.
_CONTAINERS = "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts,mpegvideo,flv,asf,ogg,nut,ivf,m4v,h264,hevc"
# Titles and the like need not be UTF-8. PyAV 19 reads them as they are, and has no such argument.
_METADATA = {} if int(av.__version__.partition(".")[0]) > 18 else {"metadata_errors": "replace"}
_OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}


class VideoError(UserError):
    """A video file that cannot give what was asked for."""


def open_video(path: str | os.PathLike) -> av.container.InputContainer:
    """Open a local video file for reading. Raises VideoError in one line for anything else."""
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file has such a name
        is_file = False
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from error
    if not is_file:
        raise VideoError(f"{path}: no such file (only local video files are opened)")
    try:
        # "file:" keeps a name such as "concat:a.avi" from being taken for a protocol.
        return av.open(f"file:{Path(path).absolute()}", options=dict(_OPEN_OPTIONS), **_METADATA)
    except av.error.ArgumentError as error:  # the white list's refusal
        raise VideoError(f"{path}: not a video file of a known container (avi, mp4, mkv, webm, ...)") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: not a readable video file ({reason(error)})") from error


def video_stream(container: av.container.InputContainer, path: str | os.PathLike) -> av.video.stream.VideoStream:
    """The first video stream, set to decode in one thread; cover pictures do not count."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError(f"{path}: its video stream is of no codec that this FFmpeg knows")
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            return stream
    raise VideoError(f"{path}: holds no video stream")


@contextlib.contextmanager
def decoding(path: str | os.PathLike) -> Iterator[None]:
    """What FFmpeg, the system or memory cannot do inside becomes a VideoError about the file."""
    try:
        yield
    except VideoError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise VideoError(f"{path}: cannot be decoded ({reason(error)})") from error


def reason(error: Exception) -> str:
    """What FFmpeg or the system says, in one line."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
