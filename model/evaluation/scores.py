"""From the figures of frames to those of sequences and benchmarks. No masks here, only numbers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Self

import numpy as np

_RECALL_THRESHOLD = 0.5
_DECAY_BINS = 4


@dataclass(frozen=True)
class Statistics:
    """A measure over the frames of a sequence, as the DAVIS benchmarks sum it up.

    Args:
        recall: Share of the frames above 0.5.
        decay: Mean of the first quarter of the frames minus mean of the last: what is lost over time.
    """

    mean: float
    recall: float
    decay: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum up the values of a sequence's frames, in temporal order.

        Raises:
            ValueError: There are none.
        """
        if not values:
            raise ValueError("there are no frames to sum up")
        # As in the public code, to the rounding: neighbouring quarters share the frame between them.
        edges = np.round(np.linspace(1, len(values), _DECAY_BINS + 1) + 1e-10).astype(int) - 1
        first, last = values[edges[0] : edges[1] + 1], values[edges[-2] : edges[-1] + 1]
        return cls(
            mean=fmean(values),
            recall=fmean(value > _RECALL_THRESHOLD for value in values),
            decay=fmean(first) - fmean(last),
        )

    @classmethod
    def mean_of(cls, sequences: Sequence[Self]) -> Self:
        """The mean over sequences, each counting once whatever its length."""
        return cls(
            mean=fmean(one.mean for one in sequences),
            recall=fmean(one.recall for one in sequences),
            decay=fmean(one.decay for one in sequences),
        )


@dataclass(frozen=True)
class SequenceScores:
    """How well the masks of a sequence fit, frame by frame.

    Args:
        category: Class of its object, where the benchmark knows classes.
        frames: Positions of the scored frames in the sequence, counted from 0.
        j: Region similarity of those frames, in [0, 1].
        f: Their boundary accuracy, in [0, 1]; empty where the benchmark does not measure it.
        flicker: 1 - IoU of the masks of each two neighbouring scored frames; empty like ``f``.
        truth_flicker: The same of the annotations.
    """

    name: str
    category: str | None
    frames: tuple[int, ...]
    j: tuple[float, ...]
    f: tuple[float, ...] = ()
    flicker: tuple[float, ...] = ()
    truth_flicker: tuple[float, ...] = ()


@dataclass(frozen=True)
class Figures:
    """J, F and flicker of a sequence, or of a group of them.

    Args:
        flicker: Mean change from mask to mask, 1 - IoU; 0 for a sequence with one scored frame.
        truth_flicker: The same of the annotations: what a steady and correct mask has.
    """

    j: Statistics
    f: Statistics
    flicker: float
    truth_flicker: float

    @property
    def jf_mean(self) -> float:
        """J&F, the mean of the two means."""
        return (self.j.mean + self.f.mean) / 2

    @classmethod
    def of(cls, scores: Sequence[SequenceScores]) -> Self:
        """The mean figures of sequences that have both J and F.

        Raises:
            ValueError: There are none, or one has no F.
        """
        return cls(
            Statistics.mean_of([Statistics.of(one.j) for one in scores]),
            Statistics.mean_of([Statistics.of(one.f) for one in scores]),
            flicker=fmean(fmean(one.flicker or [0.0]) for one in scores),
            truth_flicker=fmean(fmean(one.truth_flicker or [0.0]) for one in scores),
        )


def by_attribute(
    scores: Iterable[SequenceScores], attributes: Mapping[str, Iterable[str]]
) -> dict[str, list[SequenceScores]]:
    """Group sequences by attribute, in alphabetical order; one with several stands in several groups.

    Args:
        attributes: Of each sequence, by its name.

    Raises:
        ValueError: The attributes of a sequence are not given.
    """
    groups: dict[str, list[SequenceScores]] = defaultdict(list)
    for one in scores:
        if one.name not in attributes:
            raise ValueError(f"no attributes are given for the sequence {one.name}")
        for attribute in attributes[one.name]:
            groups[attribute].append(one)
    return dict(sorted(groups.items()))


def by_category(scores: Iterable[SequenceScores]) -> dict[str, list[SequenceScores]]:
    """Group sequences by class, in the order in which the classes come.

    Raises:
        ValueError: A sequence has no class.
    """
    groups: dict[str, list[SequenceScores]] = defaultdict(list)
    for one in scores:
        if one.category is None:
            raise ValueError(f"the sequence {one.name} has no class")
        groups[one.category].append(one)
    return dict(groups)


def j_by_category(scores: Iterable[SequenceScores]) -> dict[str, float]:
    """Mean J of each class: the mean over its sequences of the mean over their frames.

    Raises:
        ValueError: A sequence has no class, or no frames.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for one in scores:
        if one.category is None or not one.j:
            raise ValueError(f"the sequence {one.name} has no class or no frames")
        groups[one.category].append(fmean(one.j))
    return {category: fmean(means) for category, means in sorted(groups.items())}
