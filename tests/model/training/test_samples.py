from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from model.training.samples import Joined, Mixture, Sample, SampleBatch, TrainingSamples, load_batches
from model.training.sampling import JointSampler


@dataclass(frozen=True)
class NumberedSource:
    """Samples whose frames hold the source's letter and the index, and noise from the generator."""

    letter: str
    count: int
    num_frames: int = 3

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        frames = torch.from_numpy(rng.integers(256, size=(self.num_frames, 3, size, size), dtype=np.uint8))
        frames[:, 0, 0, 0], frames[:, 0, 0, 1] = ord(self.letter), index
        return Sample(frames, frames[:, 0], frames[:, 1])


def test_joined_sources_follow_each_other_as_often_as_said() -> None:
    joined = Joined([(NumberedSource("a", 2), 1), (NumberedSource("b", 3), 2), (NumberedSource("c", 0), 1)])
    samples = [joined.sample(index, np.random.default_rng(0), 2) for index in range(len(joined))]
    seen = [(chr(sample.frames[0, 0, 0, 0]), int(sample.frames[0, 0, 0, 1])) for sample in samples]
    assert seen == [("a", 0), ("a", 1)] + 2 * [("b", 0), ("b", 1), ("b", 2)]


@pytest.mark.parametrize("index", [-1, 2])
def test_joined_sources_refuse_what_they_do_not_have(index: int) -> None:
    with pytest.raises(IndexError, match=rf"within \[0, 2\), got {index}"):
        Joined([(NumberedSource("a", 2), 1)]).sample(index, np.random.default_rng(0), 2)


def batches(steps: range, workers: int = 0) -> list[SampleBatch]:
    samples = TrainingSamples(NumberedSource("v", 8), NumberedSource("i", 16, num_frames=1), size=4)
    sampler = JointSampler(videos=8, images=16, batch_size=4, seed=5)
    return list(load_batches(samples, sampler, steps, workers=workers))


def test_batches_hold_samples_of_one_kind() -> None:
    video, image, *_ = batches(range(3))
    assert (video.kind, video.frames.shape, video.masks.shape) == ("video", (4, 3, 3, 4, 4), (4, 3, 4, 4))
    assert (image.kind, image.frames.shape, image.masks.shape) == ("image", (4, 1, 3, 4, 4), (4, 1, 4, 4))
    assert (video.frames.dtype, video.masks.dtype) == (torch.uint8, torch.uint8)
    for batch in (video, image):
        assert set(batch.frames[:, 0, 0, 0, 0].tolist()) == {ord(batch.kind[0])}
        assert len(set(batch.frames[:, 0, 0, 0, 1].tolist())) == 4


def assert_equal(some: list[SampleBatch], others: list[SampleBatch]) -> None:
    assert [batch.kind for batch in some] == [batch.kind for batch in others]
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.frames, other.frames)
        assert torch.equal(one.masks, other.masks)


def test_batches_do_not_depend_on_where_a_run_began() -> None:
    assert_equal(batches(range(5, 9)), batches(range(9))[5:])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_batches_do_not_depend_on_who_makes_them() -> None:
    assert_equal(batches(range(6), workers=2), batches(range(6)))


def test_a_mixture_draws_its_sources_by_weight_and_their_samples_alike() -> None:
    mixture = Mixture([(NumberedSource("a", 2), 1), (NumberedSource("b", 5), 3)])
    assert len(mixture) == 7
    samples = [mixture.sample(0, np.random.default_rng(seed), 2) for seed in range(2000)]
    seen = Counter((chr(one.frames[0, 0, 0, 0]), int(one.frames[0, 0, 0, 1])) for one in samples)
    expected = {("a", index): 250 for index in range(2)} | {("b", index): 300 for index in range(5)}
    assert seen.keys() == expected.keys()
    assert all(seen[key] == pytest.approx(count, abs=60) for key, count in expected.items())


def test_a_mixture_follows_the_generator_alone() -> None:
    mixture = Mixture([(NumberedSource("a", 9), 1), (NumberedSource("b", 9), 1)])
    first, again = (mixture.sample(index, np.random.default_rng(3), 2) for index in (0, 17))
    assert torch.equal(first.frames, again.frames)


@pytest.mark.parametrize(("count", "weight"), [(2, 0), (2, -1), (2, float("nan")), (2, float("inf")), (0, 1)])
def test_a_mixture_refuses_weights_and_sources_that_give_nothing(count: int, weight: float) -> None:
    with pytest.raises(ValueError, match=f"got weight {weight} and {count} samples"):
        Mixture([(NumberedSource("a", 3), 1), (NumberedSource("b", count), weight)])


def test_a_mixture_needs_a_source() -> None:
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([])
