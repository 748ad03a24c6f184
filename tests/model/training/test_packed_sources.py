from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from model.held_out import HELD_OUT_SEQUENCES
from model.training.augmentation import STRONG
from model.training.packed import PackedData
from model.training.samples import Sample, SampleSource
from model.training.sources import held_out_windows, packed_sources
from tests.training_data import write_packed

SIZE = 64
WINDOWS = ("davis16", "further", "still_windows", "composites")
IMAGES = (
    "hand_stills",
    "teacher_stills",
    "clothing_stills",
    "other_stills",
    "davis16_frames",
    "further_frames",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    root = tmp_path_factory.mktemp("packed")
    write_packed(root, frames=9)
    (root / "davis16" / "val").mkdir()
    (root / "davis16" / "val" / "blackswan.mp4").write_bytes(b"not to be read")
    return PackedData(root, tmp_path_factory.mktemp("cache"), side=SIZE)


@pytest.fixture(scope="module")
def sources(data: PackedData) -> dict[str, SampleSource]:
    return packed_sources(data, num_frames=3, strides=(1, 2))


def draw(source: SampleSource, count: int) -> list[Sample]:
    return [source.sample(seed % len(source), np.random.default_rng(seed), SIZE) for seed in range(count)]


def redness(sample: Sample) -> float:
    """How much more red than green the reddest patch is; noise is averaged out."""
    frames = sample.frames.float()
    return float(functional.avg_pool2d(frames[:, 0] - frames[:, 1], 8).max())


def test_every_source_is_there(sources: dict[str, SampleSource]) -> None:
    assert set(sources) == {*WINDOWS, *IMAGES}


@pytest.mark.parametrize("name", [*WINDOWS, *IMAGES])
def test_samples_are_windows_or_images(name: str, sources: dict[str, SampleSource]) -> None:
    frames = 3 if name in WINDOWS else 1
    for sample in draw(sources[name], 3):
        assert (sample.frames.shape, sample.frames.dtype) == ((frames, 3, SIZE, SIZE), torch.uint8)
        for masks in (sample.masks, sample.side_masks):
            assert (masks.shape, masks.dtype) == ((frames, SIZE, SIZE), torch.uint8)


@pytest.mark.parametrize("name", [*WINDOWS, *IMAGES])
def test_one_index_and_seed_make_one_sample(name: str, sources: dict[str, SampleSource]) -> None:
    for first, again in zip(draw(sources[name], 4), draw(sources[name], 4), strict=True):
        assert torch.equal(first.frames, again.frames)
        assert torch.equal(first.masks, again.masks)
        assert torch.equal(first.side_masks, again.side_masks)


@pytest.mark.parametrize("name", [*WINDOWS, *IMAGES])
def test_what_is_held_out_is_never_shown(name: str, data: PackedData) -> None:
    """The pictures of the pack are grey, but for what is held out, which is red."""
    uncovered = replace(STRONG, occlusion=0)  # what covers pictures has a colour
    source = packed_sources(data, num_frames=3, strides=(1, 2), augmentation=uncovered)[name]
    assert max(redness(sample) for sample in draw(source, 40)) < 80


def test_held_out_windows_show_what_is_held_out(data: PackedData) -> None:
    windows = held_out_windows(data, 3, 2, every=4)
    assert set(windows.names) == set(HELD_OUT_SEQUENCES)
    assert len(windows.names) == len(windows) == 2 * len(HELD_OUT_SEQUENCES)
    samples = [
        windows.sample(index, np.random.default_rng(seed), SIZE) for index in (0, 5) for seed in (0, 1)
    ]
    assert min(map(redness, samples)) > 150
    assert torch.equal(samples[0].frames, samples[1].frames)
    assert not torch.equal(samples[0].masks, samples[2].masks)


def test_soft_masks_stay_soft_and_hard_ones_hard(sources: dict[str, SampleSource]) -> None:
    assert any(204 in sample.masks.unique() for sample in draw(sources["teacher_stills"], 8))
    for name in ("hand_stills", "clothing_stills", "davis16", "composites"):
        soft = ("alpha", "matte") if name == "hand_stills" else ()
        hard = [
            sample for sample in draw(sources[name], 16) if set(sample.masks.unique().tolist()) <= {0, 255}
        ]
        assert len(hard) == 16 if not soft else 8 < len(hard) < 16


def test_still_windows_differ_by_the_camera_alone(sources: dict[str, SampleSource]) -> None:
    moved = []
    for sample in draw(sources["still_windows"], 30):
        assert torch.equal(sample.masks, sample.side_masks)
        before, after = (mask.float().mean() for mask in sample.masks[:2])
        assert abs(before - after) < 20
        moved.append(not torch.equal(sample.masks[0], sample.masks[2]))
    assert 0.4 < np.mean(moved) < 0.95
