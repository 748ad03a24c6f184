"""Which frames make a window, and which of them a stream must still hold. Needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class WindowLayout:
    """A window: ``num_frames`` frames, ``frame_stride`` apart, around the one that is segmented.

    Raises:
        ValueError: ``num_frames`` is not odd and positive, or ``frame_stride`` is below 1.
    """

    num_frames: int = 3
    frame_stride: int = 4

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.num_frames % 2 == 0:
            raise ValueError(f"num_frames must be odd and positive, got {self.num_frames}")
        if self.frame_stride < 1:
            raise ValueError(f"frame_stride must be at least 1, got {self.frame_stride}")

    @property
    def margin(self) -> int:
        """How many frames a window reaches to each side of its centre."""
        return self.num_frames // 2 * self.frame_stride

    @property
    def offsets(self) -> tuple[int, ...]:
        """Positions of the window's frames relative to the centre, in temporal order."""
        return tuple(range(-self.margin, self.margin + 1, self.frame_stride))

    def indices(self, center: int, last: int) -> tuple[int, ...]:
        """Frames of the window around ``center``, in temporal order.

        Positions before frame 0 or behind frame ``last`` repeat the first or the last frame.

        Raises:
            ValueError: ``center`` is not within ``[0, last]``.
        """
        if not 0 <= center <= last:
            raise ValueError(f"center must be within [0, {last}], got {center}")
        return tuple(min(max(0, center + offset), last) for offset in self.offsets)

    def first_needed(self, center: int) -> int:
        """The first frame that the window around ``center``, or any later one, can still use."""
        return max(0, center - self.margin)

    def last_needed(self, center: int) -> int:
        """The last frame that the window around ``center`` uses, if the stream is that long."""
        return center + self.margin


def batches_of(
    start: int, stop: int | None, *, batch: int, span_frames: int | None = None
) -> Iterator[range]:
    """Cut ``[start, stop)`` into batches of ``batch`` frames; without ``stop``, there is no end of them.

    Args:
        span_frames: Batches do not reach over the ends of spans of so many frames, counted from ``start``.
    """
    first = start
    while stop is None or start < stop:
        after = start + batch
        if stop is not None:
            after = min(after, stop)
        if span_frames is not None:
            after = min(after, start + span_frames - (start - first) % span_frames)
        yield range(start, after)
        start = after
