from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.datasets import Still
from model.training.composites import Composites, Mix
from model.training.pictures import Pictures
from model.training.samples import Sample

SIZE = 96
SEEDS = range(24)
NOTHING = Mix(
    video_background=1,
    following=0,
    second_object=0,
    distractor=0,
    occluder=0,
    motion_blur=0,
    defocus=0,
    flicker=0,
    noise=0,
)


def write_still(folder: Path, name: str, foreground: np.ndarray, image: np.ndarray) -> Still:
    still = Still(folder / f"{name}.png", folder / f"{name}_mask.png")
    Image.fromarray(image.astype(np.uint8)).save(still.image)
    Image.fromarray(foreground).save(still.mask)
    return still


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Green ellipses and blocks on grey."""
    folder = tmp_path_factory.mktemp("stills")
    rows, columns = np.mgrid[:120, :160]
    shapes = [
        ((columns - 70) / 50) ** 2 + ((rows - 60) / 40) ** 2 < 1,
        (abs(columns - 80) < 30) & (abs(rows - 65) < 50),
        ((columns - 90) / 30) ** 2 + ((rows - 60) / 55) ** 2 < 1,
    ]
    images = [np.where(shape[..., None], (30, 190, 30), (128, 128, 128)) for shape in shapes]
    return Pictures.of_stills(
        [
            write_still(folder, str(n), shape, image)
            for n, (shape, image) in enumerate(zip(shapes, images, strict=True))
        ]
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """A picture without green; red rises to the right, blue downwards."""
    rows, columns = np.mgrid[:120, :160]
    image = np.dstack([60 + columns * 160 / 160, rows * 0, 60 + rows * 160 / 120])
    folder = tmp_path_factory.mktemp("videos")
    return Pictures.of_stills([write_still(folder, "ramps", rows < 0, image)])


def render(stills: Pictures, videos: Pictures, **mix: float) -> list[Sample]:
    composites = Composites(stills, videos=videos, mix=replace(NOTHING, **mix))
    samples = [composites.sample(seed % len(stills), np.random.default_rng(seed), SIZE) for seed in SEEDS]
    return [Sample(sample.frames, sample.masks == 255, sample.side_masks == 255) for sample in samples]


def green(sample: Sample) -> torch.Tensor:
    red, level, blue = sample.frames.float().unbind(1)
    return level > (red + blue) / 2


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def middle(mask: torch.Tensor) -> np.ndarray:
    """In sides of the frame."""
    return mask.nonzero().float().mean(dim=0).numpy() / SIZE


def background_shift(sample: Sample) -> np.ndarray:
    """How far the ramps of the background move between the first and the second frame, in sides."""
    clear = ~(sample.masks[0] | sample.masks[1]).numpy()
    clear[1:-1, 1:-1] &= clear[:-2, 1:-1] & clear[2:, 1:-1] & clear[1:-1, :-2] & clear[1:-1, 2:]
    before, after = (frame.float().numpy()[[2, 0]] for frame in sample.frames[:2])  # blue: rows; red: columns
    slopes = np.array([np.gradient(before[axis], axis=axis)[clear].mean() for axis in (0, 1)])
    return -(after - before)[:, clear].mean(axis=1) / slopes / SIZE


@pytest.mark.parametrize("num_frames", [1, 3, 5])
def test_a_composite_is_a_window_of_frames_with_masks(num_frames: int, stills: Pictures) -> None:
    everything = Mix(*[1.0] * 9)
    composites = Composites(stills, num_frames=num_frames, mix=everything)
    assert len(composites) == len(stills)
    sample = composites.sample(0, np.random.default_rng(0), SIZE)
    assert (sample.frames.shape, sample.frames.dtype) == ((num_frames, 3, SIZE, SIZE), torch.uint8)
    assert (sample.masks.shape, sample.masks.dtype) == ((num_frames, SIZE, SIZE), torch.uint8)


def test_one_seed_makes_one_sample(stills: Pictures, videos: Pictures) -> None:
    composites = Composites(stills, videos=videos)
    first, again, other = (composites.sample(1, np.random.default_rng(seed), SIZE) for seed in (1, 1, 2))
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize(
    "also", [{}, {"second_object": 1}, {"motion_blur": 1}, {"occluder": 0.0, "noise": 1}], ids=str
)
def test_masks_hold_the_pixels_of_the_moving_objects(
    also: dict[str, float], stills: Pictures, videos: Pictures
) -> None:
    overlaps = [overlap(green(sample), sample.masks) for sample in render(stills, videos, **also)]
    assert min(overlaps) > 0.85  # of thin slivers at the edge of the frame
    assert np.median(overlaps) > 0.97


def test_objects_are_neither_lost_nor_all_there_is(stills: Pictures, videos: Pictures) -> None:
    for sample in render(stills, videos):
        shares = sample.masks.float().mean(dim=(1, 2))
        assert shares.min() > 0.003
        assert shares.max() < 0.8


def test_what_rests_on_the_background_is_not_foreground(stills: Pictures, videos: Pictures) -> None:
    samples = render(stills, videos, distractor=1)
    masked = np.array([sample.masks.sum() for sample in samples])
    coloured = np.array([green(sample).sum() for sample in samples])
    assert (masked < 0.9 * coloured).mean() > 0.8
    assert all((sample.masks & ~green(sample)).sum() < 0.05 * sample.masks.sum() for sample in samples)


def test_what_stands_in_front_hides_the_object(stills: Pictures, videos: Pictures) -> None:
    """An occluder is green as well: where it is, there is no mask."""
    free, hidden = (render(stills, videos, occluder=share) for share in (0, 1))
    # The occluder is drawn last, so the object is the same in both.
    lost = [int((one.masks & ~other.masks).sum()) for one, other in zip(free, hidden, strict=True)]
    gained = [int((other.masks & ~one.masks).sum()) for one, other in zip(free, hidden, strict=True)]
    assert np.mean([pixels > 50 for pixels in lost]) > 0.5
    assert not any(gained)


def test_objects_move_across_the_background(stills: Pictures, videos: Pictures) -> None:
    moves = []
    for sample in render(stills, videos):
        if sample.masks[:2].flatten(1).any(dim=1).all():
            moves.append(
                np.hypot(*(middle(sample.masks[1]) - middle(sample.masks[0]) - background_shift(sample)))
            )
    assert len(moves) > 20
    assert np.median(moves) > 0.02
    assert np.mean(np.array(moves) > 0.008) > 0.85
    assert max(moves) < 0.25


def test_a_camera_that_follows_moves_the_background_most(stills: Pictures, videos: Pictures) -> None:
    shifts = [
        (np.hypot(*(middle(sample.masks[1]) - middle(sample.masks[0]))), np.hypot(*background_shift(sample)))
        for sample in render(stills, videos, following=1)
    ]
    objects, backgrounds = np.median(shifts, axis=0)
    assert backgrounds > 1.5 * objects


def test_backgrounds_can_be_stills_alone(stills: Pictures) -> None:
    sample = Composites(stills, mix=NOTHING).sample(0, np.random.default_rng(0), SIZE)
    assert sample.masks.any()
    assert not (sample.masks == 255).all()


def test_brightness_flickers(stills: Pictures, videos: Pictures) -> None:
    steady, flickering = (
        np.mean([np.ptp(sample.frames.float().mean(dim=(1, 2, 3)).numpy()) for sample in samples])
        for samples in (render(stills, videos), render(stills, videos, flicker=1))
    )
    assert flickering > steady + 3


def test_a_still_without_an_object_makes_empty_masks(tmp_path: Path, videos: Pictures) -> None:
    grey = np.full((40, 40, 3), 128)
    empty = Pictures.of_stills(
        [write_still(tmp_path, name, np.zeros((40, 40), dtype=np.bool_), grey) for name in "ab"]
    )
    sample = Composites(empty, videos=videos, mix=NOTHING).sample(0, np.random.default_rng(0), SIZE)
    assert not sample.masks.any()


def test_one_still_is_too_few(videos: Pictures) -> None:
    with pytest.raises(ValueError, match="at least two stills, got 1"):
        Composites(videos)
