"""Video file → RGB frames, one by one, as they are displayed. Memory does not grow with the video's length.

Frames are counted as they are decoded; what the container says of their number and of the duration serves
only to notice that some are missing.
"""

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.reformatter import ColorTrc, VideoReformatter
from numpy.typing import NDArray

from service.errors import UnusableVideo
from service.jobs import JobWarning
from service.media import (
    MediaLimits,
    check_frame_size,
    clockwise_rotation,
    displayed_size,
    frame_rate,
    no_frame,
    open_video,
    out_of_memory,
)
from worker.packets import PacketDecoder, ends_early

_HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
# What swscale converts, as AVColorSpace counts: RGB, BT.709, unspecified, FCC, BT.470BG, SMPTE 170M and 240M,
# BT.2020 with non-constant luminance.
_CONVERTIBLE_COLORSPACES = (0, 1, 2, 4, 5, 6, 7, 9)
_UNSPECIFIED_COLORSPACE = 2
_MISSING_FRACTION = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrame:
    """A decoded frame: ``image`` is RGB, ``(H, W, 3)``, contiguous; ``pts`` counts the stream's time base."""

    image: NDArray[np.uint8]
    pts: int | None
    time_seconds: float | None


class VideoReader:
    """The frames of an untrusted file, in the order of display. A context manager, to be iterated once.

    ``width`` and ``height`` (pixels as displayed, after rotation), ``fps`` and ``expected_frames`` (the
    container's claim) are known on entry; ``frames`` (decoded so far) and ``warnings`` are complete after the
    iteration. All images have the size of the first
    one: later frames of another size are scaled to it, with the warning ``resolution_change``.
    """

    width: int
    height: int
    fps: float | None
    frames: int
    expected_frames: int | None

    def __init__(self, path: Path, limits: MediaLimits, *, max_corrupt_fraction: float) -> None:
        """Args: max_corrupt_fraction: Share of damaged packets above which the video is refused."""
        self._path = path
        self._limits = limits
        self._max_corrupt_fraction = max_corrupt_fraction
        self._reformatter = VideoReformatter()
        self._warnings: dict[str, JobWarning] = {}

    @property
    def warnings(self) -> tuple[JobWarning, ...]:
        return tuple(self._warnings.values())

    def __enter__(self) -> Self:
        """Open the file and decode its first frame.

        Raises:
            UnusableVideo: As :func:`service.media.open_video`; or ``undecodable_stream``,
                ``dimensions_below_limit``, ``dimensions_exceed_limit``, ``resource_limit``.
            OSError: The file is not there or cannot be read.
        """
        with ExitStack() as stack:
            video = stack.enter_context(open_video(self._path, self._limits, thread_count=0))
            self._decoder = PacketDecoder(video, self._limits)
            decoded = self._decoder.frames()
            first = next(decoded, None)
            if first is None:
                raise out_of_memory() if self._decoder.out_of_memory else no_frame(video, self._limits)
            self.width, self.height = displayed_size(first)
            check_frame_size(self.width, self.height, self._limits)
            self.fps = frame_rate(video.stream)
            self.frames = 0
            self.expected_frames = self._decoder.claimed_frames()
            self._decoded = chain((first,), decoded)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def frames_from(self, first: int) -> Generator[VideoFrame | None, None, None]:
        """Decode frame after frame, and yield those from ordinal ``first`` on.

        The others are only inspected. In place of each comes None, so that whoever is no longer interested
        need not wait for the first.

        Raises:
            UnusableVideo: ``truncated_input``, ``corrupt_input``, ``too_many_frames``,
                ``dimensions_exceed_limit``, ``dimensions_below_limit``, ``undecodable_stream``,
                ``resource_limit``.
            MemoryError: Not the decoder's, but ours: there is none left for a frame.
        """
        for frame in self._decoded:
            if self.frames == self._limits.max_frames:
                raise UnusableVideo(
                    f"The video has more than the {self.frames} frames that are allowed.",
                    code="too_many_frames",
                )
            self._inspect(frame)
            self.frames += 1
            if self.frames > first:
                yield VideoFrame(self._image(frame), frame.pts, self._decoder.seconds(frame.pts))
            else:
                yield None
        self._check_complete()
        self._check_damage()
        self._check_count()

    def __iter__(self) -> Iterator[VideoFrame]:
        """All frames, as :meth:`frames_from`."""
        return (frame for frame in self.frames_from(0) if frame is not None)

    def _check_complete(self) -> None:
        """Raises: UnusableVideo: ``truncated_input``, ``resource_limit``."""
        declared, reached = self._decoder.declared_seconds(), self._decoder.reached_seconds()
        cut = declared is not None and ends_early(declared, reached, frames=self.frames)
        if self._decoder.broke_off or cut:
            self._check_memory()
            until = "" if declared is None else f", at {reached:.1f} s of {declared:.1f} s"
            raise UnusableVideo(
                f"The video breaks off after {self.frames} frames{until}.", code="truncated_input"
            )

    def _check_damage(self) -> None:
        """Raises: UnusableVideo: ``corrupt_input``, ``resource_limit``."""
        damaged, packets = self._decoder.damaged, self._decoder.packets
        counts = f"{damaged} of the video's {packets} packets are damaged"
        if damaged > packets * self._max_corrupt_fraction:
            self._check_memory()
            raise UnusableVideo(
                f"{counts}; at most {self._max_corrupt_fraction:.1%} may be.", code="corrupt_input"
            )
        if damaged:
            self._warn("damaged_frames", f"{counts}; {self.frames} frames could be decoded.")

    def _check_memory(self) -> None:
        """Raises: UnusableVideo: ``resource_limit``: what looks like damage may be for want of memory."""
        if self._decoder.out_of_memory:
            raise out_of_memory()

    def _check_count(self) -> None:
        claimed = self._decoder.claimed_frames()
        if claimed is not None and self.frames < claimed * (1 - _MISSING_FRACTION):
            # FFmpeg skips to Matroska's next intact cluster without a word. A frame rate that varies is told
            # as well: nothing tells the one from the other.
            self._warn(
                "missing_frames",
                f"The container announces about {claimed} frames; {self.frames} could be decoded.",
            )

    def _inspect(self, frame: av.VideoFrame) -> None:
        width, height = displayed_size(frame)
        check_frame_size(width, height, self._limits)
        if (width, height) != (self.width, self.height):
            self._warn(
                "resolution_change",
                f"The picture changes from {self.width}×{self.height} to {width}×{height} pixels at frame"
                f" {self.frames}; all masks have the first size.",
            )
        if frame.color_trc in _HDR_TRANSFERS:
            self._warn("hdr", "The video has a high dynamic range; it is segmented without tone mapping.")

    def _warn(self, code: str, detail: str) -> None:
        """Keep the first warning of a kind."""
        self._warnings.setdefault(code, JobWarning(code=code, detail=detail))

    def _image(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        rotation = clockwise_rotation(frame)
        sideways = rotation in (90, 270)
        if frame.colorspace not in _CONVERTIBLE_COLORSPACES:
            frame.colorspace = _UNSPECIFIED_COLORSPACE  # slightly wrong colours, where swscale would refuse
        try:
            rgb = self._reformatter.reformat(
                frame,
                width=self.height if sideways else self.width,
                height=self.width if sideways else self.height,
                format="rgb24",
            )
        except (MemoryError, BlockingIOError) as error:  # the latter: no room for a thread's stack
            raise out_of_memory() from error
        except av.FFmpegError as error:
            raise UnusableVideo(
                "The video's colour format cannot be converted to RGB.", code="undecodable_stream"
            ) from error
        return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), k=-rotation // 90), dtype=np.uint8)
