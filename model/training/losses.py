"""The losses of the paper (Eq. 15-16), on probabilities in float32."""

import torch
from torch import Tensor
from torch.nn import functional

from model.imcnet import foreground_probability

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_SSIM_C1 = 0.01**2
_SSIM_C2 = 0.03**2


def final_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of the final masks.

    Args:
        logits: ``(B, 1, H/4, W/4)``.
        target: Share of foreground, ``(B, H, W)`` in [0, 1].

    Returns:
        A scalar.
    """
    # Resizing can leave 1 by a rounding, in bfloat16 on a CPU to 1.008, and cross-entropy refuses that.
    probability = foreground_probability(logits.float()).clamp(max=1)
    return map_loss(probability, target.unsqueeze(1)).squeeze()


def side_loss(side_masks: Tensor, target: Tensor, *, stride: int = 1) -> Tensor:
    """Mean loss of all side masks (Eq. 16).

    The paper adds the side losses up; the released code, which this follows, divides their sum by their
    number, 12 with 3 frames and 4 levels.

    Args:
        side_masks: Of B windows of T frames, ``(B, T, levels, H, W)``; T is 1 for still images.
        target: Share of foreground, ``(B, T, H, W)`` in [0, 1].
        stride: Side of the squares over which masks and targets are averaged first: at 2, the loss costs a
            quarter.

    Returns:
        A scalar.
    """
    levels = side_masks.shape[2]
    masks = functional.avg_pool2d(side_masks.float().flatten(1, 2), stride).clamp(max=1)
    targets = functional.avg_pool2d(target, stride).repeat_interleave(levels, dim=1)
    return map_loss(masks, targets).mean()


def map_loss(probability: Tensor, truth: Tensor) -> Tensor:
    """Loss of M maps (Eq. 15): weighted cross-entropy, structure and overlap, each over the batch.

    Args:
        probability: ``(B, M, H, W)`` in [0, 1].
        truth: Share of foreground, ``(B, M, H, W)`` in [0, 1].

    Returns:
        ``(M,)``.
    """
    dissimilarity = 1 - structural_similarity(probability, truth)
    no_overlap = 1 - soft_iou(probability, truth)
    return weighted_cross_entropy(probability, truth) + dissimilarity.mean(0) + no_overlap.mean(0)


def weighted_cross_entropy(probability: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of M maps ``(B, M, H, W)``: ``(M,)``.

    As the released code has it, positives weigh the share of positives in the batch, and negatives that
    of negatives.
    """
    positives = truth.mean(dim=(0, 2, 3), keepdim=True)
    weight = truth * positives + (1 - truth) * (1 - positives)
    entropy = functional.binary_cross_entropy(probability, truth, weight, reduction="none")
    return entropy.mean(dim=(0, 2, 3))


def soft_iou(probability: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of probabilities with a mask, ``(B, M, H, W)`` twice to ``(B, M)`` in [0, 1].

    One pixel is added to both, so that an empty prediction of an empty mask is right.
    """
    intersection = (probability * truth).sum(dim=(2, 3))
    union = (probability + truth).sum(dim=(2, 3)) - intersection
    return (intersection + 1) / (union + 1)


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Mean structural similarity (SSIM; Wang et al., 2004, Eq. 13) of maps with values in [0, 1].

    Gaussian window of 11 x 11, sigma 1.5, the border padded with zeros.

    Args:
        first: ``(B, M, H, W)``.
        second: ``(B, M, H, W)``.

    Returns:
        ``(B, M)`` in [-1, 1].
    """
    products = (first, second, first * first, second * second, first * second)
    mean1, mean2, square1, square2, product = _blur(torch.stack(products)).unbind()
    variance1, variance2 = square1 - mean1 * mean1, square2 - mean2 * mean2
    covariance = product - mean1 * mean2
    luminance = (2 * mean1 * mean2 + _SSIM_C1) / (mean1 * mean1 + mean2 * mean2 + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variance1 + variance2 + _SSIM_C2)
    return (luminance * structure).mean(dim=(2, 3))


def _blur(maps: Tensor) -> Tensor:
    """Convolve the last two dimensions with the Gaussian window, one after the other."""
    distance = torch.arange(_SSIM_WINDOW, dtype=maps.dtype, device=maps.device) - _SSIM_WINDOW // 2
    kernel = torch.exp(-(distance**2) / (2 * _SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()
    # All maps as the channels of one image, channels last: on a CPU, backward is 20 times as fast as with
    # one channel, and a training step half as long.
    flat = maps.reshape(1, -1, *maps.shape[-2:]).contiguous(memory_format=torch.channels_last)
    count, half = flat.shape[1], _SSIM_WINDOW // 2
    rows = functional.conv2d(flat, kernel.expand(count, 1, 1, -1), padding=(0, half), groups=count)
    columns = kernel.view(1, 1, -1, 1).expand(count, 1, -1, 1)
    return functional.conv2d(rows, columns, padding=(half, 0), groups=count).view_as(maps)
