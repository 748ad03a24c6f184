import subprocess
import sys
from itertools import pairwise

import pytest

from model.windows import WindowLayout, batches_of


@pytest.mark.parametrize(
    ("center", "last", "expected"),
    [
        (10, 20, (6, 10, 14)),
        (0, 20, (0, 0, 4)),
        (3, 20, (0, 3, 7)),
        (4, 20, (0, 4, 8)),
        (17, 20, (13, 17, 20)),
        (20, 20, (16, 20, 20)),
        (1, 2, (0, 1, 2)),
        (0, 0, (0, 0, 0)),
    ],
)
def test_a_window_repeats_the_first_and_the_last_frame(
    center: int, last: int, expected: tuple[int, ...]
) -> None:
    assert WindowLayout(3, 4).indices(center, last) == expected


@pytest.mark.parametrize(
    ("num_frames", "frame_stride", "offsets", "margin"),
    [(1, 4, (0,), 0), (3, 1, (-1, 0, 1), 1), (3, 4, (-4, 0, 4), 4), (7, 2, (-6, -4, -2, 0, 2, 4, 6), 6)],
)
def test_offsets_reach_the_margin_on_both_sides(
    num_frames: int, frame_stride: int, offsets: tuple[int, ...], margin: int
) -> None:
    layout = WindowLayout(num_frames, frame_stride)
    assert layout.offsets == offsets
    assert layout.margin == margin


@pytest.mark.parametrize("layout", [WindowLayout(3, 4), WindowLayout(5, 2), WindowLayout(7, 1)])
def test_no_window_from_here_on_leaves_what_is_needed(layout: WindowLayout) -> None:
    last = 30
    for center in range(last + 1):
        later = [index for c in range(center, last + 1) for index in layout.indices(c, last)]
        assert min(later) == layout.first_needed(center)
        assert max(layout.indices(center, last)) == min(last, layout.last_needed(center))


@pytest.mark.parametrize(("center", "last"), [(-1, 5), (6, 5), (0, -1)])
def test_a_centre_outside_the_stream_is_refused(center: int, last: int) -> None:
    with pytest.raises(ValueError, match=rf"within \[0, {last}\], got {center}"):
        WindowLayout().indices(center, last)


@pytest.mark.parametrize(("num_frames", "frame_stride"), [(0, 4), (2, 4), (-1, 4), (3, 0)])
def test_impossible_layouts_are_refused(num_frames: int, frame_stride: int) -> None:
    with pytest.raises(ValueError, match="got"):
        WindowLayout(num_frames, frame_stride)


@pytest.mark.parametrize(
    ("start", "stop", "span_frames", "expected"),
    [
        (0, 20, None, [0, 8, 16, 20]),
        (3, 20, None, [3, 11, 19, 20]),
        (0, 20, 10, [0, 8, 10, 18, 20]),
        (4, 24, 10, [4, 12, 14, 22, 24]),
        (0, 12, 3, [0, 3, 6, 9, 12]),
        (0, 20, 16, [0, 8, 16, 20]),
        (5, 5, 3, []),
    ],
)
def test_batches_end_with_their_spans(
    start: int, stop: int, span_frames: int | None, expected: list[int]
) -> None:
    cut = [range(first, after) for first, after in pairwise(expected)]
    assert list(batches_of(start, stop, batch=8, span_frames=span_frames)) == cut
    endless = batches_of(start, None, batch=8, span_frames=span_frames)
    assert [next(endless) for _ in cut[:-1]] == cut[:-1]


def test_windows_come_without_torch() -> None:
    code = "import sys, model, model.windows, model.errors; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
