from pathlib import Path

import numpy as np
import pytest

from model.errors import DatasetError
from model.evaluation.youtube_objects import score_sequence
from tests.sequences import GivenMasks, square, write_sequence


def test_the_annotated_frames_are_scored_first_and_last_included(tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path, [square(0), None, None, square(5), None, square(9)], category="cat")
    predictions = GivenMasks([square(0), square(0), square(0), square(10), square(0), square(40)])
    scores = score_sequence(predictions, sequence)
    assert (scores.name, scores.category, scores.frames) == ("clip", "cat", (0, 3, 5))
    assert scores.j == pytest.approx((1, 50 / 150, 0))
    assert scores.f == ()
    assert predictions.asked_for == [0, 3, 5]


def test_an_empty_annotation_counts(tmp_path: Path) -> None:
    empty = np.zeros_like(square(0))
    scores = score_sequence(GivenMasks([empty, square(0)]), write_sequence(tmp_path, [empty, empty]))
    assert scores.j == (1, 0)


def test_a_sequence_without_annotations_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="clip"):
        score_sequence(GivenMasks([square(0)]), write_sequence(tmp_path, [None]))
