"""F, the boundary accuracy of the DAVIS benchmarks (Perazzi et al., CVPR 2016, section 4.1)."""

import math

import numpy as np

from model.evaluation.masks import Mask, check_comparable

_TOLERANCE = 0.008  # of the picture's diagonal


def boundary_accuracy(prediction: Mask, truth: Mask) -> float:
    """F = 2pr / (p + r) of the boundaries of two masks ``(H, W)``.

    Precision p is the share of the prediction's boundary that lies within 0.008 of the diagonal, rounded up
    to pixels, of the truth's; recall r the other way round. Of two empty boundaries F is 1, of one 0.

    Raises:
        ValueError: The masks differ in shape or are not boolean.
    """
    check_comparable(prediction, truth)
    radius = math.ceil(_TOLERANCE * math.hypot(*truth.shape))
    found, wanted = boundary(prediction), boundary(truth)
    precision = _covered_share(found, dilate(wanted, radius))
    recall = _covered_share(wanted, dilate(found, radius))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: Mask) -> Mask:
    """The pixels of ``mask`` that differ from their right, lower or lower right neighbour."""
    # Repeated at the edges, a last row or column has one neighbour left, and the last pixel none.
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def dilate(mask: Mask, radius: int) -> Mask:
    """Set every pixel that has a set one at most ``radius`` away (x² + y² <= radius²)."""
    # A disk is a stack of horizontal runs: widened once a column, the mask serves all rows of the disk.
    height, width = mask.shape
    padded = np.pad(mask, radius)
    widened = padded[:, radius : radius + width].copy()
    dilated = np.zeros_like(mask)
    reach = 0
    for row in range(radius, -1, -1):
        while reach < math.isqrt(radius**2 - row**2):
            reach += 1
            widened |= padded[:, radius - reach : radius - reach + width]
            widened |= padded[:, radius + reach : radius + reach + width]
        dilated |= widened[radius - row : radius - row + height]
        dilated |= widened[radius + row : radius + row + height]
    return dilated


def _covered_share(pixels: Mask, cover: Mask) -> float:
    count = np.count_nonzero(pixels)
    return np.count_nonzero(pixels & cover) / count if count else 1.0
