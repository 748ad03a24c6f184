"""The batches of each training step. A step's batches are the same, bit for bit, wherever a run resumes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from model.errors import TrainingError
from model.training.presets import Phase, TrainConfig
from model.training.processes import count, rank
from model.training.samples import Sample, SampleBatch, SampleSource, TrainingSamples, load_batches
from model.training.sampling import JointSampler, Kind

StepBatches = Sequence[SampleBatch]  # their gradients add up to one optimizer step


class Steps(Protocol):
    """Batches by step."""

    def load(self, steps: range, *, workers: int) -> Iterable[StepBatches]:
        """The batches of the given steps, in their order.

        Args:
            workers: Processes that make them; 0 makes them in this process, on demand.
        """
        ...


class JointSteps:
    """One batch a step, of windows or of stills, alternating as in the paper's training.

    Raises:
        TrainingError: The data cannot fill such batches.
    """

    def __init__(self, config: TrainConfig, videos: SampleSource, images: SampleSource) -> None:
        try:
            self._sampler = JointSampler(
                videos=len(videos),
                images=len(images),
                batch_size=config.batch_size,
                image_batches=config.image_batches,
                seed=config.seed,
            )
        except ValueError as error:
            raise TrainingError(f"these data cannot be trained on: {error}") from error
        self._samples = TrainingSamples(videos, images, config.size)

    def load(self, steps: range, *, workers: int) -> Iterator[StepBatches]:
        """This process's share of the batches."""
        share = rank(), count()
        for batch in load_batches(self._samples, self._sampler, steps, workers=workers, share=share):
            yield (batch,)


class MixedSteps(Dataset[StepBatches]):
    """A batch of windows and a batch of stills in every step, as a phase of a recipe sets them."""

    def __init__(self, phase: Phase, windows: SampleSource, images: SampleSource) -> None:
        self._phase = phase
        self._kinds: tuple[tuple[Kind, SampleSource, int], ...] = (
            ("video", windows, phase.windows_per_step),
            ("image", images, phase.stills_per_step),
        )

    def load(self, steps: range, *, workers: int) -> Iterable[StepBatches]:
        return DataLoader(self, batch_size=None, sampler=steps, num_workers=workers)

    def __getitem__(self, step: int) -> StepBatches:
        """The batches of a step, counted from 0. Both have the size that the step draws."""
        seed = self._phase.seed
        size = int(np.random.default_rng((seed, step)).choice(self._phase.sizes))
        batches = []
        for kind, source, samples in self._kinds:
            seeds = ((seed, step, position, ord(kind[0])) for position in range(samples))
            if samples:
                batches.append(
                    _batch(kind, [_draw(source, np.random.default_rng(key), size) for key in seeds])
                )
        return tuple(batches)


def _draw(source: SampleSource, rng: np.random.Generator, size: int) -> Sample:
    return source.sample(int(rng.integers(len(source))), rng, size)


def _batch(kind: Kind, samples: Sequence[Sample]) -> SampleBatch:
    return SampleBatch(
        kind,
        frames=torch.stack([sample.frames for sample in samples]),
        masks=torch.stack([sample.masks for sample in samples]),
        side_masks=torch.stack([sample.side_masks for sample in samples]),
    )
