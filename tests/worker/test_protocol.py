from typing import get_args

import numpy as np
import pytest

import model.views
import service.jobs
from worker.pipeline import mask_size
from worker.protocol import MASK, StreamRequest, pack_mask

REQUEST = StreamRequest(
    job_id="job",
    attempt=1,
    height=3,
    width=5,
    mask_height=7,
    mask_width=9,
    threshold=0.5,
    quality="exact",
    start=0,
    span_frames=256,
    max_pending=1,
)


def test_a_job_may_ask_for_every_quality_that_the_segmenter_knows() -> None:
    assert get_args(service.jobs.Quality) == get_args(model.views.Quality)


def test_a_frame_crosses_the_socket_as_it_is() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    assert np.array_equal(REQUEST.parse_frame(frame.tobytes()), frame)


def test_a_frame_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot reshape"):
        REQUEST.parse_frame(bytes(44))


def test_a_mask_of_any_size_crosses_the_socket_in_an_eighth_of_its_bytes() -> None:
    mask = np.random.default_rng(0).random((7, 9)) < 0.5
    message = pack_mask(mask, 1.5)
    assert (message[:1], len(message)) == (MASK, 1 + 8 + 8)
    parsed, inference_s = REQUEST.parse_mask(message[1:])
    assert inference_s == 1.5
    assert parsed.dtype == np.bool_
    assert np.array_equal(parsed, mask)


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((480, 854), None, (480, 854)),
        ((480, 854), 854, (480, 854)),
        ((480, 854), 427, (240, 427)),
        ((854, 480), 427, (427, 240)),
        ((16, 4096), 16, (1, 16)),
    ],
)
def test_masks_are_scaled_down_never_up(
    size: tuple[int, int], max_side: int | None, expected: tuple[int, int]
) -> None:
    assert mask_size(*size, max_side) == expected
