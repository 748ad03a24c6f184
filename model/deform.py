"""Deformable convolution (v1, without modulation), as the alignment of the network uses it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import deform_conv2d

_PIXELS_AT_A_TIME = 1024


class DeformableConv(nn.Module):
    """A 3x3 convolution whose taps are moved by offsets; stride 1, same padding, with bias.

    On CUDA it is torchvision's operator. On a CPU that operator runs on a single core, and the same map
    is computed by ``deform_by_sampling``.

    Args:
        channels: Channels in and out.
        groups: Groups of input channels that share one set of offsets.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.offset_channels = 2 * 3 * 3 * groups
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))
        # As nn.Conv2d starts.
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(channels * 3 * 3)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Tensor, offsets: Tensor) -> Tensor:
        """Sample at the moved taps; what lies outside the map is zero.

        Args:
            features: ``(N, C, h, w)``.
            offsets: In pixels, ``(N, offset_channels, h, w)``: for every group and tap, y then x.

        Returns:
            ``(N, C, h, w)`` in the type of ``features``.
        """
        # In 16 bits, sampling positions lose more the further they lie from the corner.
        dtype = torch.promote_types(features.dtype, torch.float32)
        operands = (features, offsets, self.weight, self.bias)
        inputs, moves, weight, bias = (operand.to(dtype) for operand in operands)
        if features.is_cpu:
            with torch.autocast("cpu", enabled=False):
                sampled = deform_by_sampling(inputs, moves, weight, bias)
        else:  # computes in float32 under autocast by itself
            sampled = deform_conv2d(inputs, moves, weight, bias, padding=(1, 1))
        return sampled.to(features.dtype)


def deform_by_sampling(features: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``torchvision.ops.deform_conv2d`` with padding 1 as one ``grid_sample`` and one product a map.

    On one core four times as fast, at a difference of 8e-5 in float32 and 1e-13 in float64.

    Args:
        features: ``(N, C, h, w)``.
        offsets: ``(N, 2 * 9 * G, h, w)``, laid out as in ``DeformableConv.forward``.
        weight: ``(C_out, C, 3, 3)``.
        bias: ``(C_out,)``.

    Returns:
        ``(N, C_out, h, w)``.
    """
    count, channels, height, width = features.shape
    groups = offsets.shape[1] // 18
    maps = features.reshape(count, groups, channels // groups, height, width)
    moves = offsets.view(count, groups, 9, 2, height, width)
    unmoved, scale = _tap_positions(height, width, offsets)
    kernel, column = weight.flatten(1), bias[:, None]
    # A few rows at a time: what is sampled for them stays in the cache until the product has read it.
    # With gradients it would be kept anyway, and each part would have a gradient of the size of the map.
    rows = height if torch.is_grad_enabled() else max(1, _PIXELS_AT_A_TIME // width)
    convolved = features.new_empty(count, len(weight), height, width)
    for index in range(count):
        for top in range(0, height, rows):
            part = slice(top, top + rows)
            moved = torch.addcmul(unmoved[:, :, part], moves[index, :, :, :, part].flip(2), scale)
            # The planes of x and of y stay apart in memory, as in the offsets.
            grid = moved.flatten(-2).transpose(-1, -2)
            sampled = functional.grid_sample(maps[index], grid, padding_mode="zeros", align_corners=False)
            product = torch.addmm(column, kernel, sampled.view(channels * 9, -1))
            convolved[index, :, part] = product.view(len(weight), -1, width)
    return convolved


def _tap_positions(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the taps of every output pixel lie without offsets, and what a pixel's offset counts.

    Returns:
        x then y, from -1 to 1 between the map's outer edges as for ``grid_sample``, ``(9, 2, h, w)``; and the
        length of a pixel's sides, ``(2, 1, 1)``.
    """
    taps, columns, rows = (
        torch.arange(start, stop, dtype=like.dtype, device=like.device)
        for start, stop in ((-1, 2), (0, width), (0, height))
    )
    x = (2 * (taps.view(3, 1) + columns) + 1) / width - 1
    y = (2 * (taps.view(3, 1) + rows) + 1) / height - 1
    size = (3, 3, height, width)
    positions = torch.stack(
        [x.view(1, 3, 1, width).expand(size), y.view(3, 1, height, 1).expand(size)], dim=2
    )
    return positions.view(9, 2, height, width), like.new_tensor([2 / width, 2 / height]).view(2, 1, 1)
