"""The losses against plain loops over pixels, written from the paper's formulas."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.training.losses import (
    final_loss,
    map_loss,
    side_loss,
    soft_iou,
    structural_similarity,
    weighted_cross_entropy,
)


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(*shape: int, seed: int = 1) -> Tensor:
    return (probabilities(*shape, seed=seed) < 0.3).double()


def maps(first: Tensor) -> Iterator[tuple[int, int]]:
    """The places (b, m) of the maps of ``(B, M, H, W)``."""
    return ((b, m) for b in range(first.shape[0]) for m in range(first.shape[1]))


def slow_ssim(first: Tensor, second: Tensor) -> float:
    """SSIM of two maps ``(H, W)``: one 11 x 11 window after the other, zeros outside."""
    window = {(y, x): math.exp(-(x * x + y * y) / (2 * 1.5**2)) for y in range(-5, 6) for x in range(-5, 6)}
    norm = sum(window.values())
    height, width = first.shape
    total = 0.0
    for row in range(height):
        for column in range(width):
            mean1 = mean2 = square1 = square2 = product = 0.0
            for (y, x), value in window.items():
                if 0 <= row + y < height and 0 <= column + x < width:
                    weight, a, b = (
                        value / norm,
                        float(first[row + y, column + x]),
                        float(second[row + y, column + x]),
                    )
                    mean1, mean2 = mean1 + weight * a, mean2 + weight * b
                    square1, square2 = square1 + weight * a * a, square2 + weight * b * b
                    product += weight * a * b
            variance1, variance2 = square1 - mean1**2, square2 - mean2**2
            luminance = (2 * mean1 * mean2 + 0.01**2) / (mean1**2 + mean2**2 + 0.01**2)
            structure = (2 * (product - mean1 * mean2) + 0.03**2) / (variance1 + variance2 + 0.03**2)
            total += luminance * structure
    return total / (height * width)


# -- structural similarity -------------------------------------------------------------------------------


def test_structural_similarity_is_that_of_a_loop_over_gaussian_windows() -> None:
    first, second = probabilities(2, 2, 14, 9), masks(2, 2, 14, 9)
    fast = structural_similarity(first, second)
    assert fast.shape == (2, 2)
    for b, m in maps(first):
        assert fast[b, m].item() == pytest.approx(slow_ssim(first[b, m], second[b, m]), abs=1e-12)


def test_a_map_is_entirely_similar_to_itself() -> None:
    first = masks(1, 3, 20, 20)
    torch.testing.assert_close(structural_similarity(first, first), torch.ones(1, 3).double())


def test_each_map_is_compared_on_its_own() -> None:
    first, second = probabilities(2, 3, 16, 16), masks(2, 3, 16, 16)
    together = structural_similarity(first, second)
    for b, m in maps(first):
        alone = structural_similarity(first[b : b + 1, m : m + 1], second[b : b + 1, m : m + 1])
        torch.testing.assert_close(together[b, m], alone[0, 0])


# -- weighted cross-entropy ------------------------------------------------------------------------------


def test_cross_entropy_weighs_each_kind_of_pixel_by_its_share_of_the_batch() -> None:
    probability, truth = probabilities(3, 2, 5, 4), masks(3, 2, 5, 4)
    expected = []
    for m in range(2):
        pixels = list(zip(probability[:, m].flatten().tolist(), truth[:, m].flatten().tolist(), strict=True))
        share = sum(t for _, t in pixels) / len(pixels)
        losses = [-share * math.log(p) if t else -(1 - share) * math.log(1 - p) for p, t in pixels]
        expected.append(sum(losses) / len(losses))
    assert weighted_cross_entropy(probability, truth).tolist() == pytest.approx(expected, abs=1e-12)


def test_where_all_is_background_cross_entropy_is_the_plain_one() -> None:
    probability = torch.full((1, 1, 4, 4), 0.25)
    loss = weighted_cross_entropy(probability, torch.zeros_like(probability))
    assert loss.item() == pytest.approx(-math.log(0.75))


# -- overlap ---------------------------------------------------------------------------------------------


def test_soft_iou_is_the_sum_of_products_over_what_either_holds() -> None:
    probability, truth = probabilities(2, 2, 6, 5), masks(2, 2, 6, 5)
    iou = soft_iou(probability, truth)
    for b, m in maps(probability):
        pairs = list(zip(probability[b, m].flatten().tolist(), truth[b, m].flatten().tolist(), strict=True))
        shared, either = sum(p * t for p, t in pairs), sum(p + t - p * t for p, t in pairs)
        assert iou[b, m].item() == pytest.approx((shared + 1) / (either + 1), abs=1e-12)


def test_an_empty_prediction_of_an_empty_mask_overlaps_entirely() -> None:
    empty = torch.zeros(1, 1, 4, 4)
    assert soft_iou(empty, empty).item() == 1


# -- a map, and all of them ------------------------------------------------------------------------------


def test_the_loss_of_a_map_is_the_sum_of_its_three_parts() -> None:
    probability, truth = probabilities(3, 2, 12, 12), masks(3, 2, 12, 12)
    expected = (
        weighted_cross_entropy(probability, truth)
        + (1 - structural_similarity(probability, truth)).mean(0)
        + (1 - soft_iou(probability, truth)).mean(0)
    )
    torch.testing.assert_close(map_loss(probability, truth), expected)


def test_a_map_that_is_right_loses_nothing() -> None:
    truth = masks(2, 1, 16, 16)
    assert map_loss(truth, truth).item() == pytest.approx(0, abs=1e-9)


def test_the_final_loss_compares_upsampled_probabilities_at_the_size_of_the_target() -> None:
    target = masks(2, 32, 32).float()
    logits = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    upsampled = torch.nn.functional.interpolate(
        logits.sigmoid(), (32, 32), mode="bilinear", align_corners=True
    )
    loss = final_loss(logits, target)
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(map_loss(upsampled, target.unsqueeze(1)).item(), rel=1e-5)


@pytest.mark.parametrize("num_frames", [1, 3, 5])
def test_the_side_loss_is_the_mean_over_frames_and_levels(num_frames: int) -> None:
    target = masks(2, num_frames, 32, 32).float()
    side_masks = probabilities(2, num_frames, 4, 32, 32).float()
    side = [
        map_loss(side_masks[:, frame, level].unsqueeze(1), target[:, frame].unsqueeze(1)).item()
        for frame in range(num_frames)
        for level in range(4)
    ]
    loss = side_loss(side_masks, target)
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(sum(side) / len(side), rel=1e-5)


def test_the_side_losses_are_divided_by_twelve_as_in_the_released_code() -> None:
    target = masks(1, 3, 16, 16).float()
    side_masks = probabilities(1, 3, 4, 16, 16).float()
    changed = side_masks.clone()
    changed[:, 0, 2] = 0.5
    before, after = (side_loss(masks_, target) for masks_ in (side_masks, changed))
    frame = target[:, :1]
    difference = map_loss(changed[:, 0, 2:3], frame) - map_loss(side_masks[:, 0, 2:3], frame)
    assert (after - before).item() == pytest.approx(difference.item() / 12, abs=1e-5)


def test_side_masks_can_be_compared_at_half_the_size() -> None:
    target, side_masks = masks(1, 1, 16, 16).float(), probabilities(1, 1, 4, 16, 16).float()
    means = torch.nn.functional.avg_pool2d(side_masks.flatten(1, 2), 2).view(1, 1, 4, 8, 8)
    half = torch.nn.functional.avg_pool2d(target, 2)
    assert not set(half.unique().tolist()) <= {0, 1}  # a soft target at the boundary, not a rounded one
    assert side_loss(side_masks, target, stride=2) == side_loss(means, half)


def test_a_soft_target_is_met_by_its_own_values() -> None:
    target = probabilities(1, 1, 16, 16)
    hard = (target > 0.5).double()
    assert map_loss(target, target) < map_loss(hard, target)


def test_masks_that_rounding_has_left_above_one_are_one() -> None:
    target = torch.ones(1, 3, 16, 16)
    above = torch.full((1, 3, 4, 16, 16), 1.0078125, dtype=torch.bfloat16)
    assert side_loss(above, target) == side_loss(torch.ones(1, 3, 4, 16, 16), target)


def test_half_precision_is_compared_in_float32() -> None:
    target = masks(1, 1, 16, 16).float()
    logits, side_masks = torch.randn(1, 1, 4, 4).bfloat16(), probabilities(1, 1, 4, 16, 16).bfloat16()
    assert final_loss(logits, target[0]).dtype == torch.float32
    assert final_loss(logits, target[0]) == final_loss(logits.float(), target[0])
    assert side_loss(side_masks, target) == side_loss(side_masks.float(), target)
