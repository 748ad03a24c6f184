"""What training is fed with: samples, sources of them, and batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from model.training.sampling import Batch, JointSampler, Kind


@dataclass(frozen=True)
class Sample:
    """A window of frames with their masks, or a still as a window of one.

    Masks hold the share of foreground in [0, 255]: only 0 and 255 if the annotation is hard.
    """

    frames: Tensor  # (T, 3, size, size) uint8, RGB
    masks: Tensor  # (T, size, size) uint8: target of the final mask, which is what moves
    side_masks: Tensor  # (T, size, size) uint8: target of the side masks: everything salient, moving or not


class SampleSource(Protocol):
    """Samples by index. What is random about one comes from the generator alone."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample: ...


class Joined:
    """Sources one after the other as one, each as often as said.

    Args:
        sources: Source and how many times its samples count.
    """

    def __init__(self, sources: Sequence[tuple[SampleSource, int]]) -> None:
        self._sources = [source for source, repeats in sources for _ in range(repeats)]
        self._ends = np.cumsum([len(source) for source in self._sources], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._sources else 0

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be within [0, {len(self)}), got {index}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        source = self._sources[place]
        return source.sample(index - int(self._ends[place]) + len(source), rng, size)


class Mixture:
    """Draws each sample from a source chosen by weight, at a uniformly random index.

    The index is ignored: the generator decides alone.

    Args:
        sources: Source and its weight; weights need not sum to 1.

    Raises:
        ValueError: There are no sources, one is empty, or a weight is not positive.
    """

    def __init__(self, sources: Sequence[tuple[SampleSource, float]]) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one source")
        for source, weight in sources:
            if not 0 < weight < math.inf or not len(source):
                raise ValueError(
                    f"a mixture needs positive weights and sources with samples, "
                    f"got weight {weight} and {len(source)} samples"
                )
        self._sources = [source for source, _ in sources]
        weights = np.array([weight for _, weight in sources], dtype=np.float64)
        self._ends = np.cumsum(weights / weights.sum())

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        # The last end may be a rounding below 1.
        place = min(int(np.searchsorted(self._ends, rng.random(), side="right")), len(self._sources) - 1)
        source = self._sources[place]
        return source.sample(int(rng.integers(len(source))), rng, size)


@dataclass(frozen=True)
class SampleBatch:
    """Samples of one kind; masks as in ``Sample``."""

    kind: Kind
    frames: Tensor  # (B, T, 3, size, size) uint8, RGB
    masks: Tensor  # (B, T, size, size) uint8
    side_masks: Tensor  # (B, T, size, size) uint8


class TrainingSamples(Dataset[SampleBatch]):
    """Batches by what they are to hold; equal batches are equal to the bit.

    Args:
        size: Side of the samples in pixels.
    """

    def __init__(self, videos: SampleSource, images: SampleSource, size: int) -> None:
        self._sources: dict[Kind, SampleSource] = {"video": videos, "image": images}
        self._size = size

    def __getitem__(self, batch: Batch) -> SampleBatch:
        source = self._sources[batch.kind]
        samples = [
            source.sample(key.index, np.random.default_rng(key.seed), self._size) for key in batch.keys
        ]
        return SampleBatch(
            batch.kind,
            frames=torch.stack([sample.frames for sample in samples]),
            masks=torch.stack([sample.masks for sample in samples]),
            side_masks=torch.stack([sample.side_masks for sample in samples]),
        )


def load_batches(
    samples: TrainingSamples,
    sampler: JointSampler,
    steps: range,
    *,
    workers: int,
    share: tuple[int, int] = (0, 1),
) -> DataLoader[SampleBatch]:
    """The batches of the given steps, in their order, made ``workers`` at a time by as many processes.

    Args:
        workers: 0 makes them in this process, when they are asked for.
        share: Which part of every batch, and of how many.
    """
    batches = _Batches(sampler, steps, share)
    return DataLoader(samples, batch_size=None, sampler=batches, num_workers=workers)


class _Batches(Sampler[Batch]):
    def __init__(self, sampler: JointSampler, steps: range, share: tuple[int, int]) -> None:
        self._sampler = sampler
        self._steps = steps
        self._share = share

    def __iter__(self) -> Iterator[Batch]:
        part, parts = self._share
        for step in self._steps:
            batch = self._sampler.batch(step)
            yield Batch(batch.kind, batch.keys[part::parts])

    def __len__(self) -> int:
        return len(self._steps)
