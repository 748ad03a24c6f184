"""The masks to be scored: those of a network, or PNG files that anyone wrote."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets import VideoSequence, read_frame
from model.errors import DatasetError, ResultsError
from model.evaluation.masks import Mask, read_prediction

if TYPE_CHECKING:  # files of masks are scored without torch
    from model.segmenter import Segmenter
    from model.views import Quality

ItemT = TypeVar("ItemT")


class Predictions(Protocol):
    """Masks for the frames of sequences."""

    def masks(self, sequence: VideoSequence, indices: Sequence[int]) -> Iterator[Mask]:
        """Yield the masks of the frames ``indices``, which ascend, at the size of the annotation."""


class SegmentedMasks:
    """The masks of a network. Frames are read from disk as they are needed.

    A mask is the same whether its sequence is segmented whole or in parts: each frame asked for gets all of
    its context, and what lies between two frames and serves neither is not read.
    """

    def __init__(self, segmenter: "Segmenter", *, quality: "Quality" = "exact") -> None:
        self._segmenter = segmenter
        self._quality = quality
        self._seconds = 0.0
        self._count = 0

    @property
    def seconds_per_mask(self) -> float:
        """Time from frames in memory to masks in memory, of all masks up to now; reading does not count.

        Raises:
            ValueError: There has been no mask.
        """
        if not self._count:
            raise ValueError("nothing has been segmented yet")
        return self._seconds / self._count

    def masks(self, sequence: VideoSequence, indices: Sequence[int]) -> Iterator[Mask]:
        """Segment the frames ``indices``.

        Raises:
            DatasetError: A frame cannot be read, or frames differ in size.
        """
        margin = self._segmenter.layout.margin
        for start, stop in _spans(indices):
            first = max(0, start - margin)
            frames = _read_alike(sequence.frames[first : stop + margin])
            masks = self._segmenter.segment(
                self._clocked(frames, sign=-1),  # they are read while a mask is waited for
                quality=self._quality,
                output_size=_annotation_size(sequence, start),
                start=start - first,
                stop=stop - first,
            )
            for mask in self._clocked(masks, sign=1):
                self._count += 1
                yield mask

    def _clocked(self, items: Iterable[ItemT], *, sign: int) -> Iterator[ItemT]:
        iterator = iter(items)
        while True:
            begin = time.perf_counter()
            item = next(iterator, None)
            self._seconds += sign * (time.perf_counter() - begin)
            if item is None:
                return
            yield item


class StoredMasks:
    """Masks in files, ``<folder>/<sequence>/<stem of the frame>.png``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def masks(self, sequence: VideoSequence, indices: Sequence[int]) -> Iterator[Mask]:
        """Read the masks of the frames ``indices``.

        Raises:
            ResultsError: A mask is missing, unreadable or of another size than the annotation, or the folder
                of the sequence holds a mask of no frame.
        """
        self._check_names(sequence, indices)
        for index in indices:
            path = self._path(sequence, index)
            mask = read_prediction(path)
            expected = _annotation_size(sequence, index)
            if mask.shape != expected:
                raise ResultsError(
                    f"{path} must be of the annotation's size, {expected[1]}x{expected[0]}, "
                    f"is {mask.shape[1]}x{mask.shape[0]}"
                )
            yield mask

    def save(self, sequence: VideoSequence, index: int, mask: Mask) -> None:
        """Write the mask of frame ``index`` as a 1-bit PNG."""
        path = self._path(sequence, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)

    def check_sequences(self, names: Iterable[str]) -> None:
        """Raises: ResultsError: There are masks of sequences other than ``names``, or no masks at all."""
        found = {str(path.parent.relative_to(self._folder)) for path in self._folder.rglob("*.png")}
        if not found:
            raise ResultsError(f"{self._folder} holds no masks: expected <sequence>/<frame>.png")
        if extra := sorted(found - set(names)):
            raise ResultsError(f"{self._folder} holds masks of unknown sequences: {', '.join(extra)}")

    def _path(self, sequence: VideoSequence, index: int) -> Path:
        return self._folder / sequence.name / f"{sequence.frames[index].stem}.png"

    def _check_names(self, sequence: VideoSequence, indices: Sequence[int]) -> None:
        folder = self._folder / sequence.name
        found = {path.name for path in folder.glob("*.png")}
        expected = [self._path(sequence, index).name for index in indices]
        if missing := [name for name in expected if name not in found]:
            raise ResultsError(
                f"{folder} must hold a mask for each of {len(expected)} frames, "
                f"{len(missing)} are missing: {_shortened(missing)}"
            )
        if extra := sorted(found - {f"{frame.stem}.png" for frame in sequence.frames}):
            raise ResultsError(f"{folder} holds masks of no frame of the sequence: {_shortened(extra)}")


def _spans(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split ascending ``indices`` into runs without a gap, each as its start and stop."""
    for _, run in groupby(enumerate(indices), key=lambda numbered: numbered[1] - numbered[0]):
        members = [index for _, index in run]
        yield members[0], members[-1] + 1


def _read_alike(paths: Iterable[Path]) -> Iterator[NDArray[np.uint8]]:
    first = None
    for path in paths:
        frame = read_frame(path)
        first = first or frame.shape
        if frame.shape != first:
            raise DatasetError(
                f"{path} must be of the size of the frames before it, {first[1]}x{first[0]}, "
                f"is {frame.shape[1]}x{frame.shape[0]}"
            )
        yield frame


def _annotation_size(sequence: VideoSequence, index: int) -> tuple[int, int]:
    """Height and width of a frame's annotation or, without one, of the frame."""
    path = sequence.masks[index] or sequence.frames[index]
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:
        raise DatasetError(f"cannot read the image {path}: {error}") from error


def _shortened(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
