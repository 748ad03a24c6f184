"""Deformable convolution (v1, without modulation), as the alignment of the network uses it."""

import math

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv(nn.Module):
    """A 3x3 convolution whose taps are moved by offsets; stride 1, same padding, with bias.

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
        sampled: Tensor = deform_conv2d(inputs, moves, weight, bias, padding=(1, 1))
        return sampled.to(features.dtype)
