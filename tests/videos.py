"""Small videos with known content, made on the spot, and what is known of the development clips."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

Image = NDArray[np.uint8]
CORNERS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 220))


class Clip(NamedTuple):
    """What a development clip holds, found with plain PyAV; size and rotation as displayed."""

    width: int
    height: int
    rotation: int
    decodes: int
    announced: int | None
    codec: str


CLIPS: Mapping[str, Clip] = {
    "av1_video.mkv": Clip(640, 360, 0, 125, 125, "av1"),
    "big_buck_bunny_432_433.webm": Clip(1280, 720, 0, 24, 24, "vp8"),
    "bt709_full_range.mp4": Clip(1280, 720, 0, 30, 30, "h264"),
    "chaplin.mp4": Clip(640, 360, 0, 241, 241, "h264"),
    "corrupted.mp4": Clip(1280, 720, 0, 49, 50, "h264"),
    "fire2.mp4": Clip(1280, 720, 180, 25, 25, "h264"),
    "flipping_a_pancake.mkv": Clip(426, 240, 0, 310, 310, "h264"),
    "h264_10bits.mp4": Clip(200, 200, 0, 30, 30, "h264"),
    "h265_10bits.mp4": Clip(200, 200, 0, 30, 30, "hevc"),
    "h265_video.mp4": Clip(128, 128, 0, 10, 10, "hevc"),
    "no_duration.webm": Clip(1280, 720, 0, 74, None, "vp9"),
    "smpte-2997.mp4": Clip(1920, 1080, 0, 251, 251, "h264"),
    "transparent.webm": Clip(200, 200, 0, 150, 150, "vp9"),
    "unordered.mov": Clip(50, 50, 0, 4, 4, "h264"),
    "video_0.mov": Clip(568, 320, 0, 3, 3, "h264"),
    "video_180.mov": Clip(568, 320, 180, 3, 3, "h264"),
    "video_270.mov": Clip(320, 568, 270, 3, 3, "h264"),
    "video_90.mov": Clip(320, 568, 90, 3, 3, "h264"),
}
"""``bitmap.mp4``, of one pixel, is below the limits and left out."""


def moving_square(count: int, *, width: int = 64, height: int = 48) -> Iterator[Image]:
    """A bright square that moves by two pixels a frame over a dark gradient; ``(H, W, 3)``."""
    for index in range(count):
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 2] = np.linspace(0, 90, width).astype(np.uint8)
        left = 2 * index % (width - 12)
        image[12:24, left : left + 12] = (250, 200, 40)
        yield image


def noise(count: int, *, width: int = 64, height: int = 48) -> Iterator[Image]:
    """Frames that compress badly, so that a file has a size worth cutting and packets worth damaging."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def corners(*, width: int = 64, height: int = 48) -> Image:
    """Quarters of red and green (top), blue and white (bottom): no orientation looks like another."""
    image = np.zeros((height, width, 3), np.uint8)
    top, left = slice(0, height // 2), slice(0, width // 2)
    bottom, right = slice(height // 2, height), slice(width // 2, width)
    for (rows, columns), colour in zip(
        ((top, left), (top, right), (bottom, left), (bottom, right)), CORNERS, strict=True
    ):
        image[rows, columns] = colour
    return image


def write_video(
    path: Path,
    frames: Iterable[Image],
    *,
    fps: int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    pts: Sequence[int] | None = None,
    color_trc: int | None = None,
    container_format: str | None = None,
    codec_options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> Path:
    """Encode RGB frames, ``(H, W, 3)`` uint8, into a file.

    Args:
        rotation: Degrees clockwise that a player has to turn the frames by.
        pts: Of each frame, in frame intervals. Default: 0, 1, 2, …
    """
    images = iter(frames)
    first = next(images)
    with av.open(str(path), "w", format=container_format, options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=fps, options=dict(codec_options or {}))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = pix_fmt
        if color_trc is not None:
            stream.codec_context.color_trc = color_trc
        if rotation:
            stream.set_display_rotation(-rotation)
        for index, image in enumerate(chain([first], images)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = index if pts is None else pts[index]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def growing_video(path: Path, *, frames: int = 5) -> Path:
    """So many frames of 64×48 pixels, then as many of 128×64, as a transport stream."""
    data = b""
    for width, height in ((64, 48), (128, 64)):
        write_video(path, moving_square(frames, width=width, height=height), container_format="mpegts")
        data += path.read_bytes()
    path.write_bytes(data)
    return path


def cut(path: Path, fraction: float) -> Path:
    """Keep the first part of a file only."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def damage_packets(path: Path, ordinals: Iterable[int]) -> Path:
    """Overwrite the content of these video packets with random bytes. Not for MPEG-TS, which splits them."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for ordinal in ordinals:
        start, size = places[ordinal]
        assert start is not None
        data[start + 4 : start + size] = random.Random(ordinal).randbytes(size - 4)
    path.write_bytes(data)
    return path
