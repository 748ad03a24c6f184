from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.datasets import VideoSequence
from model.errors import DatasetError, ResultsError
from model.evaluation.predictions import SegmentedMasks, StoredMasks
from model.imcnet import IMCNet
from model.segmenter import Segmenter
from tests.sequences import HEIGHT, WIDTH, square, write_sequence

# -- of a network ----------------------------------------------------------------------------------------


@pytest.fixture
def segmented(network: IMCNet) -> SegmentedMasks:
    return SegmentedMasks(Segmenter(network, device="cpu", input_size=64))


def test_single_frames_get_the_masks_that_they_have_within_the_whole(
    segmented: SegmentedMasks, tmp_path: Path
) -> None:
    sequence = write_sequence(tmp_path, [None] * 14)
    whole = list(segmented.masks(sequence, range(14)))
    indices = (0, 1, 6, 12, 13)
    for index, mask in zip(indices, segmented.masks(sequence, indices), strict=True):
        np.testing.assert_array_equal(mask, whole[index])
    assert len({mask.tobytes() for mask in whole}) > 7  # the frames can be told by their masks


def test_masks_have_the_size_of_the_annotation(segmented: SegmentedMasks, tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path, [np.zeros((20, 30), np.bool_), None])
    assert next(segmented.masks(sequence, [0])).shape == (20, 30)
    assert next(segmented.masks(sequence, [1])).shape == (HEIGHT, WIDTH)


def test_the_quality_is_that_of_the_segmenter(network: IMCNet, tmp_path: Path) -> None:
    segmenter, sequence = Segmenter(network, device="cpu", input_size=64), write_sequence(tmp_path, [None])
    frame = np.asarray(Image.open(sequence.frames[0]))
    (mask,) = SegmentedMasks(segmenter, quality="multi_scale").masks(sequence, [0])
    np.testing.assert_array_equal(mask, next(segmenter.segment([frame], quality="multi_scale")))
    assert (mask != next(segmenter.segment([frame]))).any()


def test_the_time_of_a_mask_is_known_once_there_is_one(segmented: SegmentedMasks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing"):
        _ = segmented.seconds_per_mask
    list(segmented.masks(write_sequence(tmp_path, [None] * 2), [0, 1]))
    assert 0 < segmented.seconds_per_mask < 60


def test_a_frame_of_another_size_is_named(segmented: SegmentedMasks, tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path, [None] * 3)
    Image.new("RGB", (8, 8)).save(sequence.frames[2])
    with pytest.raises(DatasetError, match=rf"00002\.jpg must be .* {WIDTH}x{HEIGHT}, is 8x8"):
        list(segmented.masks(sequence, [0]))


# -- in files --------------------------------------------------------------------------------------------


@pytest.fixture
def sequence(tmp_path: Path) -> VideoSequence:
    return write_sequence(tmp_path, [square(left) for left in range(4)])


@pytest.fixture
def stored(tmp_path: Path, sequence: VideoSequence) -> StoredMasks:
    """Holds the annotations themselves, in ``tmp_path / "results"``."""
    masks = StoredMasks(tmp_path / "results")
    for index in range(4):
        masks.save(sequence, index, square(index))
    return masks


def test_what_was_saved_is_read(stored: StoredMasks, sequence: VideoSequence, tmp_path: Path) -> None:
    masks = list(stored.masks(sequence, [1, 3]))
    np.testing.assert_array_equal(masks, [square(1), square(3)])
    names = sorted(path.name for path in (tmp_path / "results" / "clip").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png"]


def test_a_missing_mask_is_named_unless_nobody_asks_for_it(
    stored: StoredMasks, sequence: VideoSequence, tmp_path: Path
) -> None:
    (tmp_path / "results" / "clip" / "00003.png").unlink()
    assert len(list(stored.masks(sequence, [1, 2]))) == 2
    with pytest.raises(ResultsError, match=r"clip must hold .* 3 frames, 1 are missing: 00003\.png"):
        list(stored.masks(sequence, [1, 2, 3]))


def test_a_mask_of_no_frame_is_named(stored: StoredMasks, sequence: VideoSequence, tmp_path: Path) -> None:
    Image.fromarray(square(0)).save(tmp_path / "results" / "clip" / "00004.png")
    with pytest.raises(ResultsError, match=r"no frame of the sequence: 00004\.png"):
        list(stored.masks(sequence, [1]))


def test_a_mask_of_another_size_is_named_with_both_sizes(
    stored: StoredMasks, sequence: VideoSequence, tmp_path: Path
) -> None:
    Image.new("1", (WIDTH, HEIGHT - 1)).save(tmp_path / "results" / "clip" / "00001.png")
    with pytest.raises(
        ResultsError, match=rf"00001\.png must be .*{WIDTH}x{HEIGHT}, is {WIDTH}x{HEIGHT - 1}"
    ):
        list(stored.masks(sequence, [1]))


def test_sequences_that_the_dataset_does_not_have_are_named(stored: StoredMasks) -> None:
    stored.check_sequences(["clip", "another"])
    with pytest.raises(ResultsError, match="unknown sequences: clip"):
        stored.check_sequences(["another"])


def test_a_folder_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="holds no masks"):
        StoredMasks(tmp_path).check_sequences(["clip"])
