import math

import numpy as np
import pytest
from numpy.typing import NDArray

from model.evaluation.boundary import boundary, boundary_accuracy, dilate

Mask = NDArray[np.bool_]

EMPTY = np.zeros((40, 60), np.bool_)
SQUARE = EMPTY.copy()
SQUARE[10:30, 20:40] = True


def random_masks(count: int) -> list[Mask]:
    """Small masks of all densities and shapes, some blocky, some reaching over an edge."""
    random = np.random.default_rng(0)
    masks = []
    for _ in range(count):
        height, width = random.integers(1, 24, 2)
        coarse = random.random((height // 3 + 1, width // 3 + 1)) < random.random()
        blocks = coarse.repeat(3, axis=0).repeat(3, axis=1)[:height, :width]
        masks.append(blocks ^ (random.random((height, width)) < 0.1 * random.random()))
    return masks


def naive_boundary(mask: Mask) -> Mask:
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            found[y, x] = any(mask[y, x] != mask[v, u] for v, u in neighbours if v < height and u < width)
    return found


def naive_dilation(mask: Mask, radius: int) -> Mask:
    set_pixels = np.argwhere(mask)
    return np.array(
        [
            [
                any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in set_pixels)
                for x in range(mask.shape[1])
            ]
            for y in range(mask.shape[0])
        ]
    )


def naive_accuracy(prediction: Mask, truth: Mask) -> float:
    radius = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    found, wanted = naive_boundary(prediction), naive_boundary(truth)
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = (found & naive_dilation(wanted, radius)).sum() / found.sum()
    recall = (wanted & naive_dilation(found, radius)).sum() / wanted.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_the_boundary_is_that_of_a_pixel_by_pixel_search() -> None:
    for mask in random_masks(100):
        np.testing.assert_array_equal(boundary(mask), naive_boundary(mask))


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 8])
def test_dilation_is_that_of_a_pixel_by_pixel_search(radius: int) -> None:
    for mask in random_masks(12):
        np.testing.assert_array_equal(dilate(mask, radius), naive_dilation(mask, radius))


def test_the_accuracy_is_that_of_a_pixel_by_pixel_search() -> None:
    masks = random_masks(60)
    for prediction in masks:
        truth = prediction ^ (np.random.default_rng(1).random(prediction.shape) < 0.05)
        assert boundary_accuracy(prediction, truth) == pytest.approx(naive_accuracy(prediction, truth))


def test_at_the_last_row_and_column_one_neighbour_counts() -> None:
    mask = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1]], np.bool_)
    expected = np.array([[0, 1, 1], [1, 1, 0], [1, 0, 0]], np.bool_)
    np.testing.assert_array_equal(boundary(mask), expected)


def test_the_tolerance_is_a_share_of_the_diagonal_rounded_up() -> None:
    """8 pixels at 854 x 480: a line 8 pixels off is found, one 9 pixels off is not."""
    wide = np.zeros((480, 854), np.bool_)
    truth, near, far = wide.copy(), wide.copy(), wide.copy()
    truth[:, 400:], near[:, 408:], far[:, 409:] = True, True, True
    assert boundary_accuracy(near, truth) == 1
    assert boundary_accuracy(far, truth) == 0


def test_two_masks_without_boundary_agree() -> None:
    assert boundary_accuracy(EMPTY, EMPTY) == 1
    assert boundary_accuracy(~EMPTY, EMPTY) == 1


def test_a_boundary_does_not_agree_with_none() -> None:
    assert boundary_accuracy(SQUARE, EMPTY) == 0
    assert boundary_accuracy(EMPTY, SQUARE) == 0


def test_equal_masks_have_1_and_distant_ones_0() -> None:
    assert boundary_accuracy(SQUARE, SQUARE) == 1
    dot = EMPTY.copy()
    dot[2, 2] = True
    assert boundary_accuracy(dot, SQUARE) == 0


def test_masks_of_another_shape_or_type_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        boundary_accuracy(SQUARE, SQUARE[1:])
    with pytest.raises(ValueError, match="uint8"):
        boundary_accuracy(SQUARE, SQUARE.astype(np.uint8))  # type: ignore[arg-type]
