from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.errors import DatasetError, ResultsError
from model.evaluation.masks import read_prediction, read_truth
from tests.sequences import square, write_sequence

ROW = [[True, False, True, False]]


def saved(path: Path, values: list[list[int]] | NDArray[np.bool_], *, mode: str = "L") -> Path:
    image = Image.fromarray(np.array(values, np.bool_ if mode == "1" else np.uint8))
    if mode == "P":
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 1, 1, 1])
    elif mode != "1":
        image = image.convert(mode)
    image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    return path


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("1", [[1, 0, 1, 0]]),
        ("L", [[255, 0, 255, 0]]),
        ("L", [[128, 127, 200, 2]]),
        ("L", [[1, 0, 1, 0]]),
        ("P", [[1, 0, 3, 0]]),
    ],
)
def test_foreground_is_told_from_the_kind_of_file(tmp_path: Path, mode: str, values: list[list[int]]) -> None:
    assert read_prediction(saved(tmp_path / "mask.png", values, mode=mode)).tolist() == ROW


def test_faint_levels_are_background_though_none_is_strong(tmp_path: Path) -> None:
    assert not read_prediction(saved(tmp_path / "mask.png", [[100, 2, 0, 0]])).any()


def test_a_coloured_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"mask\.png must be .* RGB"):
        read_prediction(saved(tmp_path / "mask.png", [[255, 0]], mode="RGB"))


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_text("text")
    with pytest.raises(ResultsError, match=r"mask\.png is not a readable image"):
        read_prediction(tmp_path / "mask.png")


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "mask.png", np.random.default_rng(0).random((64, 64)) < 0.5, mode="1")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ResultsError, match=r"mask\.png is not a readable image"):
        read_prediction(path)


def test_the_truth_of_a_frame_that_is_not_annotated_cannot_be_read(tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path, [square(5), None])
    np.testing.assert_array_equal(read_truth(sequence, 0), square(5))
    with pytest.raises(DatasetError, match=r"00001\.jpg is not annotated"):
        read_truth(sequence, 1)
