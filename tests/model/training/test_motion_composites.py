from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from model.training.augmentation import UNVARIED
from model.training.composite_scene import Scene
from model.training.motion import View
from model.training.motion_composites import Kind, MotionComposites, MotionMix
from model.training.samples import Sample
from model.training.stored_pictures import PictureIndex, StoredPictures

SIDE = 128
SIZE = 96
SEEDS = range(24)
KINDS = get_args(Kind)
Render = Callable[[MotionMix], list[Sample]]
NOTHING_ELSE = MotionMix(second_object=0, occluder=0, motion_blur=0, light=0, shadow=0)


def stored(names: list[str], pictures: list[np.ndarray], *, soft: bool = False) -> StoredPictures:
    count = len(names)
    index = PictureIndex(tuple(names), (1.0,) * count, (soft,) * count)
    return StoredPictures(np.stack(pictures).astype(np.uint8), index)


def ramps() -> np.ndarray:
    """Without green; red rises to the right, blue downwards."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.stack([50 + columns, rows * 0, 50 + rows, rows * 0])


def ellipse(x: float, y: float, width: float, height: float) -> np.ndarray:
    """A green ellipse over ramps."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    inside = ((columns - x) / width) ** 2 + ((rows - y) / height) ** 2 < 1
    return np.where(inside, np.array([30, 190, 30, 255])[:, None, None], ramps())


@pytest.fixture(scope="module")
def stills() -> StoredPictures:
    shapes = [(64, 64, 40, 30), (60, 70, 25, 45), (70, 60, 30, 30), (64, 60, 45, 25)]
    return stored(["pets_1", "pets_2", "duts_1", "cats_1"], [ellipse(*shape) for shape in shapes])


@pytest.fixture(scope="module")
def cutouts() -> StoredPictures:
    """Green disks of 50 pixels with a soft border on a transparent square."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    alpha = np.clip((25 - np.hypot(columns - 25, rows - 25)) / 3, 0, 1) * 255
    colours = np.where(alpha > 0, np.array([30, 190, 30])[:, None, None], 0)
    return stored(["duts_9"], [np.concatenate([colours, alpha[None]])], soft=True)


@pytest.fixture(scope="module")
def scenes() -> StoredPictures:
    return stored(["ramps"], [ramps()])


def only(kind: str, **probabilities: float) -> MotionMix:
    return replace(NOTHING_ELSE, **{name: float(name == kind) for name in KINDS}, **probabilities)


@pytest.fixture(scope="module")
def render(stills: StoredPictures, cutouts: StoredPictures, scenes: StoredPictures) -> Render:
    def samples(mix: MotionMix) -> list[Sample]:
        source = MotionComposites(stills, cutouts, [(scenes, 1)], num_frames=3, mix=mix, camera=UNVARIED)
        return [source.sample(0, np.random.default_rng(seed), SIZE) for seed in SEEDS]

    return samples


def green(sample: Sample) -> torch.Tensor:
    red, level, blue = sample.frames.float().unbind(1)
    return level > (red + blue) / 2


def middle(mask: torch.Tensor) -> np.ndarray:
    """In sides of the frame."""
    return mask.nonzero().double().mean(dim=0).numpy() / SIZE


def background_shift(sample: Sample) -> np.ndarray:
    """How far the ramps of the background move between the first and the second frame, in sides."""
    clear = (sample.side_masks[:2] == 0).all(dim=0).numpy()
    clear[1:-1, 1:-1] &= clear[:-2, 1:-1] & clear[2:, 1:-1] & clear[1:-1, :-2] & clear[1:-1, 2:]
    before, after = (frame.float().numpy()[[2, 0]] for frame in sample.frames[:2])  # blue: rows; red: columns
    slopes = np.array([np.gradient(before[axis], axis=axis)[clear].mean() for axis in (0, 1)])
    return -(after - before)[:, clear].mean(axis=1) / slopes / SIZE


def touches_edge(mask: torch.Tensor) -> bool:
    return bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())


def own_motion(sample: Sample, masks: torch.Tensor) -> float | None:
    """How far something moves against the background; None where the frame cuts it off."""
    if not masks[:2].flatten(1).any(dim=1).all() or any(map(touches_edge, masks[:2])):
        return None
    return float(np.hypot(*(middle(masks[1]) - middle(masks[0]) - background_shift(sample))))


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_is_salient_and_masks_are_hard(kind: str, render: Render) -> None:
    everything = {"occluder": 1.0, "motion_blur": 1.0, "light": 1.0, "shadow": 1.0, "second_object": 1.0}
    for sample in render(only(kind, **everything)):
        assert (sample.frames.shape, sample.frames.dtype) == ((3, 3, SIZE, SIZE), torch.uint8)
        assert (sample.masks.dtype, sample.side_masks.dtype) == (torch.uint8, torch.uint8)
        assert set(sample.masks.unique().tolist()) | set(sample.side_masks.unique().tolist()) <= {0, 255}
        assert (sample.masks <= sample.side_masks).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_side_masks_hold_everything_salient(kind: str, render: Render) -> None:
    for sample in render(only(kind, occluder=0.5)):
        salient = sample.side_masks == 255
        assert (green(sample) & salient).sum() / (green(sample) | salient).sum() > 0.85


@pytest.mark.parametrize("kind", ["crowd", "following", "plain"])
def test_what_rests_is_salient_but_not_in_the_mask(kind: str, render: Render) -> None:
    resting = [(s.side_masks > s.masks)[1].float().mean() for s in render(only(kind))]
    assert np.mean(np.array(resting) > 0.005) > 0.8


@pytest.mark.parametrize("kind", ["ordinary", "crowd", "following"])
def test_the_mask_is_what_moves_against_the_background(kind: str, render: Render) -> None:
    samples = render(only(kind))
    moving = [own_motion(sample, sample.masks == 255) for sample in samples]
    resting = [own_motion(sample, sample.side_masks > sample.masks) for sample in samples]
    movers = [motion for motion in moving if motion is not None]
    assert len(movers) >= 6
    assert np.median(movers) > 0.02
    # Not 0: what rests is partly hidden by what moves, and near things pass faster than far ones.
    assert np.median([motion for motion in resting if motion is not None] or [0]) < 0.5 * np.median(movers)


@pytest.mark.parametrize("kind", ["resting", "rippling"])
def test_without_a_mover_the_mask_is_what_is_salient(kind: str, render: Render) -> None:
    samples = render(only(kind))
    assert all(torch.equal(sample.masks, sample.side_masks) for sample in samples)
    motions = [own_motion(sample, sample.masks == 255) for sample in samples]
    assert np.median([motion for motion in motions if motion is not None]) < 0.015


def test_rippling_backgrounds_move_within_themselves(scenes: StoredPictures) -> None:
    """Rippling or not, the camera moves alike; what is left of the change are the ripples."""
    background, unrests = scenes.read(0, SIZE), []
    for seed in range(8):
        calm, rippling = (
            Scene(background, np.zeros(2), np.random.default_rng(seed), View(SIZE, 1.2), ripples=ripples).at(
                [0, 1]
            )[0][:, 0]
            for ripples in (False, True)
        )
        unrest = (rippling[1] - rippling[0]) - (calm[1] - calm[0])
        unrests.append(float(unrest.std()))
    assert np.median(unrests) > 0.6  # levels; a pixel is about one
    assert max(unrests) < 12


def test_a_plain_object_is_not_green(render: Render) -> None:
    """It has the texture of a background; those of stills have some green."""
    shares = [float(green(s)[s.masks == 255].float().mean()) for s in render(only("plain"))]
    assert np.median(shares) < 0.1


def test_an_occluder_hides_what_moves(render: Render) -> None:
    areas = [
        np.mean(
            [float((sample.masks > 0).float().mean()) for sample in render(only("crowd", occluder=share))]
        )
        for share in (0.0, 1.0)
    ]
    assert areas[1] < areas[0]


def test_one_seed_makes_one_sample_whatever_the_index(
    stills: StoredPictures, cutouts: StoredPictures, scenes: StoredPictures
) -> None:
    source = MotionComposites(stills, cutouts, [(scenes, 1)], num_frames=5)
    for seed in range(8):
        first, again = (source.sample(index, np.random.default_rng(seed), SIZE) for index in (0, 3))
        assert torch.equal(first.frames, again.frames)
        assert torch.equal(first.masks, again.masks)
        assert torch.equal(first.side_masks, again.side_masks)
    other = source.sample(0, np.random.default_rng(99), SIZE)
    assert not torch.equal(first.frames, other.frames)
    assert len(first.frames) == 5


def test_nearly_every_window_shows_something(render: Render) -> None:
    shares = [float((s.masks[1] > 0).float().mean()) for kind in KINDS for s in render(only(kind))]
    assert np.mean(np.array(shares) >= 0.004) > 0.97


def test_a_mix_needs_a_kind() -> None:
    with pytest.raises(ValueError, match="at least 0, with a kind above 0"):
        MotionMix(**dict.fromkeys(KINDS, 0.0))
    with pytest.raises(ValueError, match="at least 0"):
        MotionMix(crowd=-0.1)


def test_without_cutouts_there_are_no_composites(stills: StoredPictures, scenes: StoredPictures) -> None:
    with pytest.raises(ValueError, match="need stills, cut-outs and backgrounds"):
        MotionComposites(stills, stills.select(lambda name: False), [(scenes, 1)], num_frames=3)
