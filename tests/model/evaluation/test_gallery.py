from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.datasets import VideoSequence
from model.evaluation.gallery import write_contact_sheet, write_worst
from model.evaluation.scores import SequenceScores
from tests.sequences import HEIGHT, WIDTH, GivenMasks, Mask, square, write_sequence

EMPTY = np.zeros_like(square(0))


def scored(name: str, *j: float) -> SequenceScores:
    return SequenceScores(name, None, tuple(range(1, len(j) + 1)), j)


@pytest.fixture
def sequences(tmp_path: Path) -> dict[str, VideoSequence]:
    """Two sequences whose frames are plain grey."""
    made = {name: write_sequence(tmp_path, [square(5)] * 7, name=name) for name in ("dog", "bus")}
    for sequence in made.values():
        for frame in sequence.frames:
            Image.new("RGB", (WIDTH, HEIGHT), "grey").save(frame)
    return made


def colour_share(path: Path, colour: tuple[int, int, int]) -> float:
    """Share of the picture's pixels that are about of ``colour``."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return float((np.abs(pixels - colour).max(axis=2) < 40).mean())


TRUTH, PREDICTION = (60, 210, 90), (255, 0, 200)


def test_the_worst_frame_of_each_sequence_is_shown_once(
    tmp_path: Path, sequences: dict[str, VideoSequence]
) -> None:
    predictions = GivenMasks([EMPTY] * 7)
    scores = [scored("bus", 0.3, 0.2, 0.9), scored("dog", 0.5, 0.6, 0.1)]
    write_worst(tmp_path / "worst.jpg", scores, sequences, predictions)
    assert predictions.asked_for == [3, 2]  # the dog is worse than the bus
    assert colour_share(tmp_path / "worst.jpg", TRUTH) > 0.005
    assert colour_share(tmp_path / "worst.jpg", PREDICTION) == 0


def test_best_median_and_worst_frame_are_shown_from_the_best_sequence_down(
    tmp_path: Path, sequences: dict[str, VideoSequence]
) -> None:
    predictions = GivenMasks([square(30)] * 7)
    scores = [scored("dog", 0.1, 0.3, 0.2, 0.5, 0.4), scored("bus", 0.9, 0.8, 0.7, 0.6, 0.5)]
    write_contact_sheet(tmp_path / "sheet.jpg", scores, sequences, predictions)
    assert predictions.asked_for == [1, 3, 5, 4, 2, 1]
    assert colour_share(tmp_path / "sheet.jpg", PREDICTION) > 0.005
    assert colour_share(tmp_path / "sheet.jpg", TRUTH) == 0


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.png", "PNG")])
def test_the_suffix_says_the_kind_of_picture(
    tmp_path: Path, sequences: dict[str, VideoSequence], name: str, kind: str
) -> None:
    write_worst(tmp_path / name, [scored("dog", 0.5)], sequences, GivenMasks([EMPTY] * 7))
    with Image.open(tmp_path / name) as image:
        assert image.format == kind


def test_a_jpeg_of_many_sequences_stays_small(tmp_path: Path, sequences: dict[str, VideoSequence]) -> None:
    large = np.random.default_rng(0).integers(0, 256, (240, 427, 3), np.uint8)
    for frame in sequences["dog"].frames:
        Image.fromarray(large).resize((WIDTH * 8, HEIGHT * 8)).save(frame, quality=95)
    for mask in sequences["dog"].masks:
        assert mask is not None
        Image.new("1", (WIDTH * 8, HEIGHT * 8), 1).save(mask)
    everything: Mask = np.ones((HEIGHT * 8, WIDTH * 8), np.bool_)
    many = {f"dog{number}": sequences["dog"] for number in range(60)}
    predictions = GivenMasks([everything] * 7)
    path = tmp_path / "sheet.jpg"
    write_contact_sheet(path, [scored(name, 0.5, 0.4, 0.3) for name in many], many, predictions)
    assert len(predictions.asked_for) == 24 * 3
    assert path.stat().st_size < 1_000_000
