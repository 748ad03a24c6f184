"""What a job leaves: the mask archive and the overlay video. One writer each, fed frame by frame."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import av
import av.video.stream
import numpy as np
from PIL import Image

from service.jobs import Artifact, ArtifactKind, JobOptions, ModelInfo
from service.storage import sync
from worker.decode import VideoFrame
from worker.protocol import Frame, Mask

_TINT = np.array([255, 48, 96], np.uint16)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip knows: equal masks shall give equal bytes
_OVERLAY_TIME_BASE = Fraction(1, 90_000)  # fine enough for the pts of any frame rate


class ArtifactWriter(Protocol):
    """A context manager; the file is complete when it is left without an exception."""

    path: Path
    media_type: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, frame: VideoFrame, mask: Mask) -> None: ...


class MaskArchive:
    """``masks.zip``: ``masks/{ordinal:08d}.png`` per frame, and ``manifest.json``.

    The masks are one-bit greyscale PNGs, which stand for 0 and 255. Nothing in the archive depends on when,
    where or by which job it was made.
    """

    media_type = "application/zip"

    def __init__(self, path: Path, *, options: JobOptions, model: ModelInfo, fps: float | None) -> None:
        self.path = path
        self._zip = zipfile.ZipFile(path, "x", zipfile.ZIP_STORED)
        self._frames: list[dict[str, Any]] = []
        self._manifest: dict[str, Any] = {
            "version": 1,
            "model": model.model_dump(),
            "options": options.model_dump(mode="json", include={"threshold", "max_side", "quality"}),
            "fps": fps,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                manifest = {**self._manifest, "frames": self._frames}
                self._write("manifest.json", json.dumps(manifest, indent=1).encode())
        finally:
            self._zip.close()

    def add(self, frame: VideoFrame, mask: Mask) -> None:
        """Append the next frame's mask, ``(H, W)`` bool."""
        name = f"masks/{len(self._frames):08d}.png"
        self._write(name, encode_mask(mask))
        if not self._frames:
            self._manifest["height"], self._manifest["width"] = mask.shape
        self._frames.append({"file": name, "pts": frame.pts, "time_s": frame.time_seconds})

    def _write(self, name: str, data: bytes) -> None:
        self._zip.writestr(zipfile.ZipInfo(name, _EPOCH), data)


class OverlayVideo:
    """``overlay.mp4``: the video with tinted foreground, H.264, at the masks' size rounded down to even."""

    media_type = "video/mp4"

    def __init__(self, path: Path, *, fps: float | None) -> None:
        self.path = path
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        self._fps = fps or 25.0
        self._stream: av.video.stream.VideoStream | None = None
        self._last_pts = -1

    def __enter__(self) -> Self:
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
        stream = self._container.add_stream("libx264", rate=Fraction(self._fps).limit_denominator(1001))
        stream.height, stream.width = max(2, height & ~1), max(2, width & ~1)  # 4:2:0 has no odd sizes
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = _OVERLAY_TIME_BASE
        stream.options = {"preset": "veryfast", "crf": "23"}
        return stream

    def _next_pts(self, time_seconds: float | None) -> int:
        """The frame's own time where it moves forward, else the next beat: muxers take no backward pts."""
        beat = (
            self._last_pts + max(1, round(1 / (self._fps * _OVERLAY_TIME_BASE))) if self._last_pts >= 0 else 0
        )
        own = None if time_seconds is None else round(time_seconds / _OVERLAY_TIME_BASE)
        self._last_pts = own if own is not None and own > self._last_pts else beat
        return self._last_pts


def encode_mask(mask: Mask) -> bytes:
    """A one-bit greyscale PNG of a ``(H, W)`` bool mask."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def tint(image: Frame, mask: Mask) -> Frame:
    """``image`` (``(H, W, 3)`` uint8) with its foreground mixed half and half with a signal colour."""
    tinted = image.copy()
    tinted[mask] = (tinted[mask].astype(np.uint16) + _TINT) // 2
    return tinted


@contextmanager
def open_writer(
    kind: ArtifactKind, directory: Path, *, options: JobOptions, model: ModelInfo, fps: float | None
) -> Iterator[ArtifactWriter]:
    """The writer of one kind of artifact, into ``directory``."""
    writer: ArtifactWriter
    match kind:
        case ArtifactKind.MASKS:
            writer = MaskArchive(directory / "masks.zip", options=options, model=model, fps=fps)
        case ArtifactKind.OVERLAY:
            writer = OverlayVideo(directory / "overlay.mp4", fps=fps)
    with writer:
        yield writer


def finish(writer: ArtifactWriter) -> Artifact:
    """Make a written artifact durable, and describe it."""
    sync(writer.path)
    with open(writer.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Artifact(
        name=writer.path.name,
        media_type=writer.media_type,
        bytes=writer.path.stat().st_size,
        sha256=digest,
    )
