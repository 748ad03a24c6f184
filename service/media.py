"""How an untrusted video file is opened: one recipe, for the probe and the decoder.

The recipe keeps FFmpeg from following what a file points to (playlists, references, URLs), from decoders
that nobody needs, and from sizes that cost gigabytes. Every refusal carries a fixed sentence: PyAV's own text
holds the path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import av
import av.logging
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from service.errors import UnusableVideo

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts"
CODECS = "h264,hevc,vp8,vp9,av1,libdav1d,mpeg4,mpeg2video,mjpeg,prores"
IO_TIMEOUT_SECONDS = 10

Rotation = Literal[0, 90, 180, 270]
_ROTATIONS: tuple[Rotation, ...] = (0, 90, 180, 270)


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What a video may be; pixels of area, pixels, seconds, counts."""

    max_pixels: int = 4096 * 2304
    min_side: int = 16
    max_duration_seconds: float = 600
    max_frames: int = 20_000
    max_streams: int = 32


class OpenVideo(NamedTuple):
    """An open file, the stream in it that is the video, and the width and height found in opening it."""

    container: InputContainer
    stream: VideoStream
    announced_size: tuple[int, int]


@contextmanager
def open_video(path: Path, limits: MediaLimits, *, thread_count: int) -> Iterator[OpenVideo]:
    """Open an untrusted file; nothing is decoded yet but what FFmpeg needs to know the streams.

    Args:
        thread_count: Threads of the decoder; 0 lets FFmpeg choose.
    Raises:
        UnusableVideo: ``empty_file``, ``not_a_video``, ``unsupported_container``, ``unsupported_codec``,
            ``no_video_stream``, ``too_many_streams``, ``resource_limit``.
        OSError: The file is not there or cannot be read.
    """
    if not path.stat().st_size:
        raise UnusableVideo("The file is empty.", code="empty_file")
    with _open_container(path, limits) as container:
        if len(container.streams) > limits.max_streams:
            raise _too_many_streams(limits)
        stream = _video_stream(container)
        announced_size = stream.codec_context.width, stream.codec_context.height
        # What av.open got held for its own probing only; the decoder that is opened next starts afresh.
        stream.codec_context.options = {**stream.codec_context.options, **_codec_options(limits)}
        # Slices only: a decoder with frame threads reports the errors of other packets or of none, and loses
        # up to a frame per thread at the end, so that the frames would depend on the number of cores.
        stream.codec_context.thread_type = "SLICE"
        stream.codec_context.thread_count = thread_count
        yield OpenVideo(container, stream, announced_size)


def clockwise_rotation(frame: VideoFrame) -> Rotation:
    """Degrees clockwise by which a decoded frame is to be turned for display, to the nearest quarter.

    FFmpeg's display matrix counts anticlockwise. Mirroring, which it could ask for as well, is not applied.
    """
    return _ROTATIONS[round(-frame.rotation / 90) % 4]


def displayed_size(frame: VideoFrame) -> tuple[int, int]:
    """Width and height of a decoded frame in pixels as displayed, after rotation."""
    if clockwise_rotation(frame) in (90, 270):
        return frame.height, frame.width
    return frame.width, frame.height


def check_frame_size(width: int, height: int, limits: MediaLimits) -> None:
    """Raises: UnusableVideo: ``dimensions_below_limit``, ``dimensions_exceed_limit``."""
    if min(width, height) < limits.min_side:
        raise UnusableVideo(
            f"The picture has {width}×{height} pixels; at least {limits.min_side} a side are needed.",
            code="dimensions_below_limit",
        )
    if width * height > limits.max_pixels:
        raise UnusableVideo(
            f"The picture has {width}×{height} pixels; at most {limits.max_pixels} in all are allowed.",
            code="dimensions_exceed_limit",
        )


def no_frame(video: OpenVideo, limits: MediaLimits) -> UnusableVideo:
    """Why a video gave no frame: the decoder refuses what is too large, or there was nothing to decode."""
    width, height = video.stream.codec_context.width, video.stream.codec_context.height
    if not width:  # a decoder that refuses to open for the size forgets it
        width, height = video.announced_size
    if width * height > limits.max_pixels:
        return UnusableVideo(
            f"The picture has {width}×{height} pixels; at most {limits.max_pixels} in all are allowed.",
            code="dimensions_exceed_limit",
        )
    return UnusableVideo("No frame of the video can be decoded.", code="undecodable_stream")


def out_of_memory() -> UnusableVideo:
    return UnusableVideo("Reading the video takes too much memory.", code="resource_limit")


def frame_rate(stream: VideoStream) -> float | None:
    """Mean frames per second, as the container has it or FFmpeg guesses it."""
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def stream_duration_seconds(stream: VideoStream) -> float | None:
    """How long the video stream says that it is, whatever the other streams do.

    Matroska has no field for it; its writers put it into a tag, ``00:00:10.333000000``.
    """
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def claimed_frames(stream: VideoStream, duration_seconds: float | None) -> int | None:
    """How many frames the container says there are, or as many as fit its duration and frame rate."""
    if stream.frames:
        return stream.frames
    fps = frame_rate(stream)
    return round(duration_seconds * fps) if duration_seconds and fps else None


def _codec_options(limits: MediaLimits) -> dict[str, str]:
    return {"max_pixels": str(limits.max_pixels), "codec_whitelist": CODECS}


def _open_container(path: Path, limits: MediaLimits) -> InputContainer:
    # These are the process's, but nothing else listens; without them FFmpeg's reasons are lost, or are so
    # the second time.
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=False) as log:
            return av.open(
                f"file:{path.absolute()}",
                mode="r",
                options=_codec_options(limits),
                container_options={
                    "format_whitelist": FORMATS,
                    "protocol_whitelist": "file",
                    # One more than allowed: Matroska and MPEG-TS silently leave out what is above.
                    "max_streams": str(limits.max_streams + 1),
                    "enable_drefs": "0",
                },
                metadata_errors="replace",  # else a title in Latin-1 is an error
                timeout=IO_TIMEOUT_SECONDS,
            )
    except (av.FFmpegError, MemoryError) as error:
        raise _refusal(error, [message for _, _, message in log], limits) from error
    finally:
        av.logging.set_level(None)


def _refusal(error: Exception, log: list[str], limits: MediaLimits) -> UnusableVideo:
    """What the failure to open a file means: by the error and, where that does not tell, FFmpeg's log."""
    if isinstance(error, av.error.ArgumentError) and any("not on whitelist" in line for line in log):
        return UnusableVideo(
            "Only MP4, QuickTime, Matroska, WebM, AVI and MPEG-TS files are taken.",
            code="unsupported_container",
        )
    if isinstance(error, MemoryError):
        if any("max_streams" in line for line in log):  # a stream too many is "out of memory" in MP4 and AVI
            return _too_many_streams(limits)
        return out_of_memory()
    if isinstance(error, av.error.ExitError):
        return UnusableVideo("Reading the file takes too long.", code="resource_limit")
    return UnusableVideo("The file is not a video, or its structure is damaged.", code="not_a_video")


def _too_many_streams(limits: MediaLimits) -> UnusableVideo:
    return UnusableVideo(
        f"The file has more than the {limits.max_streams} streams that are allowed.", code="too_many_streams"
    )


def _video_stream(container: InputContainer) -> VideoStream:
    """The first video stream that is no attached picture (cover art)."""
    streams = (s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
    stream = next(streams, None)
    if stream is None:
        raise UnusableVideo("The file holds no video stream.", code="no_video_stream")
    # There is no context where FFmpeg knows no decoder.
    if stream.codec_context is None or stream.codec_context.name not in CODECS.split(","):
        raise UnusableVideo(
            "Only H.264, HEVC, VP8, VP9, AV1, MPEG-4, MPEG-2, Motion JPEG and ProRes video is taken.",
            code="unsupported_codec",
        )
    return stream
