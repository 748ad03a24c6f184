"""The four maps that a backbone makes of a frame, and their whitening."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

WHITENING_EPS = 1e-5
TOP_GAIN = 2.5


class Pyramid(NamedTuple):
    """Maps of a backbone, ``(B, C, H/s, W/s)`` at strides s = 4, 8, 16 and 32."""

    v2: Tensor
    v3: Tensor
    v4: Tensor
    v5: Tensor


class Whitening(nn.Module):
    """Standardise the channels of a map by fixed statistics: (x - mean) / sqrt(variance + 1e-5).

    Attributes:
        mean, variance: ``(C,)``; 0 and 1 until ``PyramidWhitening.measure`` sets them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Args: ``(B, C, h, w)``. Returns the same shape."""
        scale, shift = self.constants()
        return maps * scale + shift

    def constants(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of the map, ``(C, 1, 1)`` each."""
        scale = torch.rsqrt(self.variance + WHITENING_EPS)
        return scale.view(-1, 1, 1), (-self.mean * scale).view(-1, 1, 1)


class FoldedWhitening(nn.Module):
    """Replaces a ``Whitening`` at inference: float16 would lose the smallest variances."""

    def __init__(self, whitening: Whitening) -> None:
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        for name, constant in zip(("scale", "shift"), whitening.constants(), strict=True):
            self.register_buffer(name, constant)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.addcmul(self.shift, maps, self.scale)


class PyramidWhitening(nn.Module):
    """Whiten V2 to V4; V5 becomes 2.5 ReLU(whitened V5).

    The maps of an EfficientNet are linear outputs of very different ranges. The decoder was designed for
    the rectified maps of a ResNet, and multiplies V5 with itself: hence the ReLU, and a gain close to 2.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Whitening(count) for count in channels)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        v2, v3, v4, v5 = (level(maps) for level, maps in zip(self.levels, pyramid, strict=True))
        return Pyramid(v2, v3, v4, TOP_GAIN * v5.relu())

    @torch.no_grad()
    def measure(self, pyramids: Iterable[Pyramid]) -> None:
        """Set the statistics to those of all pixels of ``pyramids``, whose sizes may differ.

        Raises:
            ValueError: There are none.
        """
        levels = cast("list[Whitening]", list(self.levels))
        counts = [0] * len(levels)
        sums = [torch.zeros(2, len(level.mean), dtype=torch.float64) for level in levels]
        for pyramid in pyramids:
            for place, maps in enumerate(pyramid):
                values = maps.double().cpu()
                counts[place] += values.numel() // values.shape[1]
                sums[place] += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        if not all(counts):
            raise ValueError("whitening needs at least one pyramid to measure its statistics")
        for level, count, (total, squares) in zip(levels, counts, sums, strict=True):
            mean = total / count
            level.mean.copy_(mean)
            level.variance.copy_((squares / count - mean.square()).clamp(min=0))
