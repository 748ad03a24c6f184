"""The protocol on small sequences, and the figures that the public DAVIS code gives for real ones."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.datasets import VideoSequence
from model.errors import DatasetError
from model.evaluation.boundary import dilate
from model.evaluation.davis import ATTRIBUTES, mean_jaccard, score_sequence
from model.evaluation.masks import read_truth
from model.evaluation.scores import Figures
from tests.sequences import GivenMasks, square, write_sequence

Mask = NDArray[np.bool_]


def test_first_and_last_frame_are_left_out(tmp_path: Path) -> None:
    predictions = GivenMasks([square(40), square(5), square(10), square(40)])
    scores = score_sequence(predictions, write_sequence(tmp_path, [square(5)] * 4))
    assert scores.frames == (1, 2)
    assert scores.j == pytest.approx((1, 50 / 150))
    assert scores.f[0] == 1
    assert 0 < scores.f[1] < 1
    assert predictions.asked_for == [1, 2]


def test_of_two_frames_nothing_is_left_to_score(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"clip must have 3 frames or more.* has 2"):
        score_sequence(GivenMasks([square(0)] * 2), write_sequence(tmp_path, [square(0)] * 2))


def test_flicker_is_the_change_between_neighbouring_scored_frames(tmp_path: Path) -> None:
    predictions = GivenMasks([square(40), square(0), square(5), square(5), square(40)])
    truth = write_sequence(tmp_path, [square(40), square(0), square(1), square(11), square(40)])
    scores = score_sequence(predictions, truth)
    assert scores.flicker == pytest.approx((1 - 50 / 150, 0))
    assert scores.truth_flicker == pytest.approx((1 - 90 / 110, 1))


def test_masks_that_stay_empty_do_not_flicker_and_one_that_vanishes_does(tmp_path: Path) -> None:
    empty = np.zeros_like(square(0))
    sequence = write_sequence(tmp_path, [square(0), empty, empty, square(0), square(0)])
    scores = score_sequence(GivenMasks([empty, square(0), empty, empty, empty]), sequence)
    assert scores.flicker == (1, 0)
    assert scores.truth_flicker == (0, 1)


def test_the_mean_j_counts_each_sequence_once(tmp_path: Path) -> None:
    long = write_sequence(tmp_path, [square(0)] * 7, name="long")
    short = write_sequence(tmp_path, [square(20)] * 3, name="short")
    assert mean_jaccard(GivenMasks([square(0)] * 7), [long, short]) == 0.5


def test_the_mean_j_of_every_nth_frame_asks_for_no_others(tmp_path: Path) -> None:
    predictions = GivenMasks([square(0), square(0), *[square(40)] * 6])
    assert mean_jaccard(predictions, [write_sequence(tmp_path, [square(0)] * 8)], every=4) == 0.5
    assert predictions.asked_for == [1, 5]


def test_the_mean_j_of_no_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="no sequences"):
        mean_jaccard(GivenMasks([]), [])


def test_there_are_fifteen_attributes() -> None:
    assert len(ATTRIBUTES) == 15


# -- what the public code gives --------------------------------------------------------------------------

# J and F of masks that are made from the truth. The last rows are mean, recall and decay of the benchmark.
GOLDEN = {
    #                       shift5            disk3             box
    "blackswan": (0.89834, 1.00000, 0.89924, 0.99242, 0.22867, 0.09895),
    "bmx-trees": (0.52026, 1.00000, 0.64471, 0.93962, 0.07353, 0.04510),
    "breakdance": (0.86985, 1.00000, 0.89394, 0.99455, 0.19423, 0.09190),
    "car-roundabout": (0.95822, 1.00000, 0.94344, 0.97509, 0.51675, 0.14418),
    "cows": (0.87710, 1.00000, 0.89826, 0.98544, 0.42398, 0.20096),
    "dog": (0.89644, 1.00000, 0.92038, 0.99368, 0.32140, 0.09129),
    "drift-straight": (0.93163, 0.99513, 0.91988, 0.99858, 0.11509, 0.05868),
    "horsejump-high": (0.76394, 1.00000, 0.80447, 0.97248, 0.14310, 0.07009),
    "parkour": (0.81249, 1.00000, 0.85806, 0.99087, 0.11602, 0.05912),
    "soapbox": (0.85831, 1.00000, 0.88151, 0.94558, 0.26591, 0.12376),
    "mean": (0.83866, 0.99951, 0.86639, 0.97883, 0.23987, 0.09840),
    "recall": (0.96923, 1.00000, 0.98846, 1.00000, 0.11224, 0.00000),
    "decay": (0.01586, 0.00178, 0.00872, -0.00888, -0.01750, 0.03286),
}


def shift5(truth: Mask) -> Mask:
    """Moved 5 pixels to the right; nothing comes in at the left."""
    shifted = np.zeros_like(truth)
    shifted[:, 5:] = truth[:, :-5]
    return shifted


def disk3(truth: Mask) -> Mask:
    return dilate(truth, 3)


def box(truth: Mask) -> Mask:
    height, width = truth.shape
    boxed = np.zeros_like(truth)
    boxed[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return boxed


class FromTruth:
    """Predictions that are made from the truth."""

    def __init__(self, change: Callable[[Mask], Mask]) -> None:
        self._change = change

    def masks(self, sequence: VideoSequence, indices: Sequence[int]) -> Iterator[Mask]:
        return (self._change(read_truth(sequence, index)) for index in indices)


@pytest.fixture(scope="module")
def validation(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[VideoSequence]:
    """The ten sequences of the development data; their frames are only names here."""
    sequences = []
    for archive in sorted((data_dir / "davis16" / "val").glob("*.masks.zip")):
        folder = tmp_path_factory.mktemp("annotations")
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        masks = tuple(sorted(folder.iterdir()))
        name = archive.name.removesuffix(".masks.zip")
        sequences.append(VideoSequence(name, tuple(mask.with_suffix(".jpg") for mask in masks), masks))
    return sequences


@pytest.mark.data
@pytest.mark.parametrize(("column", "change"), [(0, shift5), (2, disk3), (4, box)])
def test_figures_are_those_of_the_public_code(
    validation: list[VideoSequence], column: int, change: Callable[[Mask], Mask]
) -> None:
    scores = [score_sequence(FromTruth(change), sequence) for sequence in validation]
    all_figures = Figures.of(scores)
    measured = {one.name: (Figures.of([one]).j.mean, Figures.of([one]).f.mean) for one in scores} | {
        statistic: (getattr(all_figures.j, statistic), getattr(all_figures.f, statistic))
        for statistic in ("mean", "recall", "decay")
    }
    assert measured.keys() == GOLDEN.keys()
    for name, figures in measured.items():
        assert figures == pytest.approx(GOLDEN[name][column : column + 2], abs=1e-5), name


@pytest.mark.data
def test_all_foreground_has_the_j_that_the_public_code_gives(validation: list[VideoSequence]) -> None:
    assert mean_jaccard(FromTruth(np.ones_like), validation) == pytest.approx(0.0885, abs=5e-5)
