"""What the parts of the network are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """A pre-activation residual block without norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        residual: Tensor = self.conv2(self.conv1(features.relu()).relu())
        return features + residual


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1)


def widen(conv: nn.Conv2d, channels: int) -> None:
    """Add input channels to a convolution, in place; their weights are zero at first."""
    weight = functional.pad(conv.weight.detach(), (0, 0, 0, 0, 0, channels))
    conv.weight = nn.Parameter(weight)
    conv.in_channels += channels


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize ``(N, C, h, w)`` to ``size`` (height, width), corners onto corners."""
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def enlarge(maps: Tensor, factor: int) -> Tensor:
    height, width = maps.shape[-2:]
    return resize(maps, (factor * height, factor * width))


def pool(maps: Tensor) -> Tensor:
    """Halve the size: maximum and average of 3x3 neighbourhoods side by side, ``(N, 2C, h/2, w/2)``."""
    maximum = functional.max_pool2d(maps, 3, stride=2, padding=1)
    # The border's zeros count in the average, as where the released weights were trained.
    average = functional.avg_pool2d(maps, 3, stride=2, padding=1, count_include_pad=True)
    return torch.cat([maximum, average], dim=1)
