"""What a job leaves: the mask archive and the overlay video, put together from their parts."""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import av.video.stream
import numpy as np

from service.durable import sync
from service.jobs import Artifact, EngineInfo, JobOptions, ModelInfo
from worker.decode import VideoFrame
from worker.protocol import Frame, Mask

_TINT = np.array([255, 48, 96], np.uint16)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip knows: equal masks shall give equal bytes
_OVERLAY_TIME_BASE = Fraction(1, 90_000)  # fine enough for the pts of any frame rate
_OVERLAY_THREADS = 4  # x264's output depends on their number, so it is not left to the machine


def write_archive(
    path: Path,
    masks: Iterable[tuple[int | None, float | None, bytes]],
    *,
    size: tuple[int, int] | None,
    options: JobOptions,
    model: ModelInfo,
    engine: EngineInfo,
    fps: float | None,
) -> Artifact:
    """Write ``masks.zip``: ``masks/{ordinal:08d}.png`` per frame, and ``manifest.json``.

    Nothing in the archive depends on when, where, by which job or in how many attempts it was made.

    Args:
        masks: Each frame's pts, time in seconds, and one-bit greyscale PNG, which stands for 0 and 255.
        size: Height and width of the masks, if there are any.
    """
    manifest: dict[str, Any] = {
        "version": 1,
        "model": model.model_dump(),
        "engine": engine.model_dump(),
        "options": options.model_dump(mode="json", include={"threshold", "max_side", "quality"}),
        "fps": fps,
    }
    if size is not None:
        manifest["height"], manifest["width"] = size
    frames = manifest["frames"] = []
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for pts, time_s, data in masks:
            name = f"masks/{len(frames):08d}.png"
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
            frames.append({"file": name, "pts": pts, "time_s": time_s})
        archive.writestr(zipfile.ZipInfo("manifest.json", _EPOCH), json.dumps(manifest, indent=1).encode())
    return _finish(path, "application/zip")


def write_overlay(path: Path, segments: Sequence[Path]) -> Artifact:
    """Write ``overlay.mp4``: the segments' packets, one after the other, as they are."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream: av.video.stream.VideoStream | None = None
        for segment in segments:
            with av.open(str(segment), format="nut") as part:
                if stream is None:
                    stream = container.add_stream_from_template(part.streams.video[0])
                for packet in part.demux(video=0):
                    if packet.size:  # the last one is empty, and only says that it is
                        packet.stream = stream
                        container.mux(packet)
    return _finish(path, "video/mp4")


class OverlaySegment:
    """A part of the overlay: the video with tinted foreground, at the masks' size rounded down to even.

    H.264 in NUT; a context manager. Segments can be joined as they are: each begins with a key frame, and
    without B-frames packets are in the order of display. ``last_pts`` counts 1/90000 s.

    Args:
        last_pts: Of the segment before; -1 for the first.
    """

    def __init__(self, path: Path, *, fps: float | None, last_pts: int) -> None:
        self.path = path
        self.last_pts = last_pts
        self._fps = fps or 25.0
        self._stream: av.video.stream.VideoStream | None = None

    def __enter__(self) -> Self:
        # NUT keeps any time base as it is.
        self._container = av.open(str(self.path), "w", format="nut")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._container as container:
            if kind is None and self._stream is not None:
                container.mux(self._stream.encode(None))

    def add(self, frame: VideoFrame, mask: Mask) -> None:
        """Append the next frame with its mask, ``(H, W)`` bool."""
        height, width = mask.shape
        if self._stream is None:
            self._stream = self._open_stream(height, width)
        picture = av.VideoFrame.from_ndarray(frame.image, format="rgb24")
        if frame.image.shape[:2] != mask.shape:
            picture = picture.reformat(width=width, height=height)
        pixels: Frame = picture.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        tinted = av.VideoFrame.from_ndarray(tint(pixels, mask), format="rgb24")
        tinted.pts, tinted.time_base = self._next_pts(frame.time_seconds), _OVERLAY_TIME_BASE
        self._container.mux(self._stream.encode(tinted))

    def _open_stream(self, height: int, width: int) -> av.video.stream.VideoStream:
        rate = Fraction(self._fps).limit_denominator(1001)
        stream = self._container.add_stream("libx264", rate=rate)
        stream.height, stream.width = max(2, height & ~1), max(2, width & ~1)  # 4:2:0 has no odd sizes
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = _OVERLAY_TIME_BASE
        stream.codec_context.thread_count = _OVERLAY_THREADS
        stream.codec_context.flags |= av.codec.context.Flags.global_header  # as mp4 wants it
        # x264's macroblock tree gives other bits in one of a hundred runs: it reads what nobody has written.
        stream.options = {"preset": "veryfast", "crf": "23", "bf": "0", "mbtree": "0"}
        return stream

    def _next_pts(self, time_seconds: float | None) -> int:
        """The frame's own time where it moves forward, else the next beat: muxers take no backward pts."""
        beat = (
            self.last_pts + max(1, round(1 / (self._fps * _OVERLAY_TIME_BASE))) if self.last_pts >= 0 else 0
        )
        own = None if time_seconds is None else round(time_seconds / _OVERLAY_TIME_BASE)
        self.last_pts = own if own is not None and own > self.last_pts else beat
        return self.last_pts


def tint(image: Frame, mask: Mask) -> Frame:
    """``image`` (``(H, W, 3)`` uint8) with its foreground mixed half and half with a signal colour."""
    tinted = image.copy()
    tinted[mask] = (tinted[mask].astype(np.uint16) + _TINT) // 2
    return tinted


def _finish(path: Path, media_type: str) -> Artifact:
    """Make a written artifact durable, and describe it."""
    sync(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Artifact(name=path.name, media_type=media_type, bytes=path.stat().st_size, sha256=digest)
