"""The protocol of DAVIS-2016: J and F of every frame but a sequence's first and last.

Not that of DAVIS-2017's unsupervised track, which keeps all frames and so gives other figures.
"""

from collections.abc import Iterable
from statistics import fmean

from model.datasets import VideoSequence
from model.errors import DatasetError
from model.evaluation.boundary import boundary_accuracy
from model.evaluation.jaccard import region_similarity
from model.evaluation.masks import Mask, read_truth
from model.evaluation.predictions import Predictions
from model.evaluation.scores import SequenceScores

SEQUENCES = {"train": 30, "val": 20}

# Perazzi et al., CVPR 2016, table 1.
ATTRIBUTES = {
    "AC": "appearance change",
    "BC": "background clutter",
    "CS": "camera shake",
    "DB": "dynamic background",
    "DEF": "deformation",
    "EA": "edge ambiguity",
    "FM": "fast motion",
    "HO": "heterogeneous object",
    "IO": "interacting objects",
    "LR": "low resolution",
    "MB": "motion blur",
    "OCC": "occlusion",
    "OV": "out of view",
    "SC": "shape complexity",
    "SV": "scale variation",
}


def scored_frames(sequence: VideoSequence) -> range:
    """Raises: DatasetError: There are none."""
    if len(sequence.frames) < 3:
        raise DatasetError(
            f"the sequence {sequence.name} must have 3 frames or more, for first and last are not scored, "
            f"has {len(sequence.frames)}"
        )
    return range(1, len(sequence.frames) - 1)


def score_sequence(predictions: Predictions, sequence: VideoSequence) -> SequenceScores:
    """Measure J and F of the scored frames, and how much masks and annotations change between them.

    Raises:
        DatasetError: A frame or its annotation is missing or cannot be read, or nothing is to be scored.
        ResultsError: The predictions are files that do not fit the sequence.
    """
    frames = scored_frames(sequence)
    j, f, flicker, truth_flicker = [], [], [], []
    before: tuple[Mask, Mask] | None = None
    for index, prediction in zip(frames, predictions.masks(sequence, frames), strict=True):
        truth = read_truth(sequence, index)
        j.append(region_similarity(prediction, truth))
        f.append(boundary_accuracy(prediction, truth))
        if before is not None:
            flicker.append(1 - region_similarity(before[0], prediction))
            truth_flicker.append(1 - region_similarity(before[1], truth))
        before = prediction, truth
    return SequenceScores(
        sequence.name,
        sequence.category,
        frames=tuple(frames),
        j=tuple(j),
        f=tuple(f),
        flicker=tuple(flicker),
        truth_flicker=tuple(truth_flicker),
    )


def mean_jaccard(predictions: Predictions, sequences: Iterable[VideoSequence], *, every: int = 1) -> float:
    """Mean J over the sequences, of every ``every``-th scored frame: to watch a training by, at little cost.

    With ``every`` 1 it is the J mean of the benchmark.

    Raises:
        DatasetError, ResultsError: As for ``score_sequence``.
        ValueError: There are no sequences.
    """
    means = []
    for sequence in sequences:
        frames = scored_frames(sequence)[::every]
        masks = zip(frames, predictions.masks(sequence, frames), strict=True)
        means.append(fmean(region_similarity(mask, read_truth(sequence, index)) for index, mask in masks))
    if not means:
        raise ValueError("there are no sequences")
    return fmean(means)
