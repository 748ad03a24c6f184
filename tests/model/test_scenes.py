import numpy as np
import pytest

from model.scenes import render_scene


def test_a_scene_has_images_and_masks_of_the_size_asked_for() -> None:
    scene = list(render_scene(frames=3, height=48, width=64, seed=1))
    assert len(scene) == 3
    for image, mask in scene:
        assert (image.shape, image.dtype) == ((48, 64, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((48, 64), np.bool_)


def test_equal_seeds_make_equal_scenes_and_others_do_not() -> None:
    first, again, other = (
        np.stack([image for image, _ in render_scene(frames=2, height=32, width=32, seed=seed)])
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_longer_scene_begins_like_a_shorter_one() -> None:
    short = list(render_scene(frames=2, height=32, width=40, seed=2))
    long = list(render_scene(frames=5, height=32, width=40, seed=2))
    for (image, mask), (same_image, same_mask) in zip(short, long, strict=False):
        np.testing.assert_array_equal(image, same_image)
        np.testing.assert_array_equal(mask, same_mask)


@pytest.mark.parametrize("seed", range(5))
def test_the_object_stays_in_the_picture_and_leaves_room_for_background(seed: int) -> None:
    for _, mask in render_scene(frames=150, height=36, width=64, seed=seed):
        assert 0.02 < mask.mean() < 0.5


def test_object_and_background_both_move() -> None:
    scene = list(render_scene(frames=9, height=72, width=96, seed=3))
    (first, first_mask), (last, last_mask) = scene[0], scene[-1]
    assert (first_mask != last_mask).any()
    background = ~(first_mask | last_mask)
    change = np.abs(first.astype(int) - last)[background]
    assert change.mean() > 5  # the noise alone would make 2


def test_more_objects_cover_more() -> None:
    one, three = (
        next(render_scene(frames=1, height=96, width=160, objects=count, seed=0))[1] for count in (1, 3)
    )
    assert three.sum() > one.sum()


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 0}, {"objects": 0}, {"height": 15}, {"width": 15}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_arguments_out_of_range_are_refused_at_once(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        render_scene(**{"frames": 1, "height": 32, "width": 32, **wrong})
