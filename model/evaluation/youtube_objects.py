"""The protocol of YouTube-Objects: J of the annotated frames, about every tenth."""

from model.datasets import VideoSequence
from model.errors import DatasetError
from model.evaluation.jaccard import region_similarity
from model.evaluation.masks import read_truth
from model.evaluation.predictions import Predictions
from model.evaluation.scores import SequenceScores

CLASSES = 10


def scored_frames(sequence: VideoSequence) -> tuple[int, ...]:
    """Raises: DatasetError: There are none."""
    annotated = tuple(index for index, mask in enumerate(sequence.masks) if mask is not None)
    if not annotated:
        raise DatasetError(f"no frame of the sequence {sequence.name} is annotated")
    return annotated


def score_sequence(predictions: Predictions, sequence: VideoSequence) -> SequenceScores:
    """Measure J of the annotated frames.

    Raises:
        DatasetError: A frame or annotation cannot be read, or nothing is annotated.
        ResultsError: The predictions are files that do not fit the sequence.
    """
    frames = scored_frames(sequence)
    masks = zip(frames, predictions.masks(sequence, frames), strict=True)
    j = tuple(region_similarity(mask, read_truth(sequence, index)) for index, mask in masks)
    return SequenceScores(sequence.name, sequence.category, frames, j)
