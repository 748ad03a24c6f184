"""Finished parts of a job, which outlive the attempt that made them.

::

    spans-<key>/000000/span.json     what is in it, with checksums
                      /masks.bin     the frames' mask PNGs, one after the other
                      /overlay.nut   the frames' part of the overlay video, where one is wanted

A span is made in the attempt's own directory, synced, and published by one rename. All attempts with the same
key make equal bytes, so whoever is second throws its own away.
"""

import errno
import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, BinaryIO, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.durable import clear, sync, write_synced
from service.errors import ImcnetError
from service.jobs import read_stored
from worker.artifacts import OverlaySegment
from worker.decode import VideoFrame
from worker.png import encode_mask
from worker.protocol import Mask

logger = logging.getLogger(__name__)

_READ_BYTES = 2**20


class SpanDamaged(ImcnetError):
    """A finished span is not what was stored. It is removed, so another attempt makes it anew."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)


class SpanTimings(_Stored):
    """Seconds spent on a span; they overlap."""

    decode_s: float
    inference_s: float
    encode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskEntry:
    """A frame's mask within ``masks.bin``, and when the frame is shown."""

    pts: int | None
    time_s: float | None
    bytes: int
    crc32: int


class OverlayEntry(_Stored):
    """``overlay.nut``. The next span's frames come after ``last_pts``."""

    crc32: int
    last_pts: int


class Span(_Stored):
    """``span.json``."""

    version: Annotated[int, Field(ge=1)] = 1
    height: int
    width: int
    any_foreground: bool
    timings: SpanTimings
    masks: tuple[MaskEntry, ...]
    overlay: OverlayEntry | None


@dataclass(frozen=True, kw_only=True)
class FinishedSpan:
    """A span that is stored in ``directory``."""

    directory: Path
    record: Span

    @property
    def frames(self) -> int:
        return len(self.record.masks)

    def masks(self) -> Iterator[tuple[MaskEntry, bytes]]:
        """The frames' PNGs, in order.

        Raises:
            SpanDamaged: One is not what was stored.
            FileNotFoundError: The job was taken away.
        """
        with self._open("masks.bin") as file:
            for entry in self.record.masks:
                data = file.read(entry.bytes)
                if len(data) != entry.bytes or zlib.crc32(data) != entry.crc32:
                    raise _damaged(self.directory)
                yield entry, data

    def overlay(self) -> Path:
        """The part of the overlay.

        Raises:
            SpanDamaged: There is none, or it is not what was stored.
            FileNotFoundError: The job was taken away.
        """
        with self._open("overlay.nut") as file:
            if self.record.overlay is None or _crc32(file) != self.record.overlay.crc32:
                raise _damaged(self.directory)
        return self.directory / "overlay.nut"

    def _open(self, name: str) -> BinaryIO:
        try:
            return open(self.directory / name, "rb")
        except FileNotFoundError as error:
            if self.directory.exists():
                raise _damaged(self.directory) from error
            raise


class SpanStore:
    """The finished spans of a job, from the first on.

    Args:
        directory: Created when the first span is finished; its parent is the job's.
        length: Frames of a span; the last one of a video may be shorter.
    """

    def __init__(self, directory: Path, length: int) -> None:
        self.length = length
        self._directory = directory

    def finished(self, *, overlay: bool) -> list[FinishedSpan]:
        """The longest run of whole spans from the beginning; those that turn out damaged are removed.

        Args:
            overlay: Whether only those count that hold their part of the overlay.
        """
        found: list[FinishedSpan] = []
        while (span := self._read(len(found), overlay=overlay)) is not None:
            found.append(span)
            if span.frames < self.length:  # the video's last
                break
        return found

    def publish(self, draft: Path, index: int) -> FinishedSpan:
        """Make a draft the span of this index, durably, unless there is one already.

        Raises:
            FileNotFoundError: The draft was taken away with its attempt, or the job is gone.
        """
        if not self._directory.exists():
            # From the workspace, as everything: a job that has ended is not to get an empty directory.
            empty = draft.with_name(self._directory.name)
            empty.mkdir()
            _move(empty, self._directory)
        place = self._place(index)
        _move(draft, place)
        return FinishedSpan(directory=place, record=read_stored(Span, place / "span.json"))

    def _read(self, index: int, *, overlay: bool) -> FinishedSpan | None:
        place = self._place(index)
        try:
            span = FinishedSpan(directory=place, record=read_stored(Span, place / "span.json"))
            for _ in span.masks():
                pass
            if overlay:
                span.overlay()
        except SpanDamaged:
            return None
        except (FileNotFoundError, ValidationError):
            if place.exists():
                _damaged(place)
            return None
        return span

    def _place(self, index: int) -> Path:
        return self._directory / f"{index:06d}"


@dataclass
class SpanDraft:
    """A span in the making, in a new directory at ``directory``; a context manager.

    Args:
        overlay: Where its part of the overlay goes, if one is wanted.
    """

    directory: Path
    overlay: OverlaySegment | None
    _masks: list[MaskEntry] = field(default_factory=list)
    _size: tuple[int, int] = (0, 0)
    _any_foreground: bool = False

    def __enter__(self) -> Self:
        self.directory.mkdir()
        with ExitStack() as stack:
            self._file = stack.enter_context(open(self.directory / "masks.bin", "xb"))
            if self.overlay is not None:
                stack.enter_context(self.overlay)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def frames(self) -> int:
        return len(self._masks)

    def add(self, frame: VideoFrame, mask: Mask) -> None:
        """Append the next frame's mask, ``(H, W)`` bool."""
        data = encode_mask(mask)
        self._file.write(data)
        self._masks.append(
            MaskEntry(pts=frame.pts, time_s=frame.time_seconds, bytes=len(data), crc32=zlib.crc32(data))
        )
        self._size = (mask.shape[0], mask.shape[1])
        self._any_foreground = self._any_foreground or bool(mask.any())
        if self.overlay is not None:
            self.overlay.add(frame, mask)

    def complete(self, timings: SpanTimings) -> None:
        """Make durable what is there, and describe it. Call it after the context has been left."""
        overlay = None
        if self.overlay is not None:
            sync(self.overlay.path)
            with open(self.overlay.path, "rb") as file:
                overlay = OverlayEntry(crc32=_crc32(file), last_pts=self.overlay.last_pts)
        sync(self.directory / "masks.bin")
        record = Span(
            height=self._size[0],
            width=self._size[1],
            any_foreground=self._any_foreground,
            timings=timings,
            masks=tuple(self._masks),
            overlay=overlay,
        )
        write_synced(self.directory / "span.json", record.model_dump_json().encode())
        sync(self.directory)


def total_timings(spans: Sequence[FinishedSpan]) -> SpanTimings:
    return SpanTimings(
        decode_s=sum(span.record.timings.decode_s for span in spans),
        inference_s=sum(span.record.timings.inference_s for span in spans),
        encode_s=sum(span.record.timings.encode_s for span in spans),
    )


def _damaged(directory: Path) -> SpanDamaged:
    logger.error("The finished span %s is damaged; it is made anew", directory.name)
    clear(directory)
    return SpanDamaged("A finished part of the job was damaged.")


def _move(draft: Path, place: Path) -> None:
    """Rename a directory durably, or throw it away where there is one already that holds something."""
    try:
        draft.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        clear(draft)
    sync(place.parent)


def _crc32(file: BinaryIO) -> int:
    value = 0
    while chunk := file.read(_READ_BYTES):
        value = zlib.crc32(chunk, value)
    return value
