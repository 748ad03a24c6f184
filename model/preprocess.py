"""From frames to the network's input, and from its probabilities to those of the frame's own pixels."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Normalisation = Literal["imagenet", "centred"]

STATISTICS: dict[Normalisation, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "centred": ((127 / 255,) * 3, (128 / 255,) * 3),
}
"""Mean and deviation by channel, of values in [0, 1]. ``centred`` is (x - 127) / 128 of those in [0, 255]."""


def resize_frame(frame: NDArray[np.uint8], size: int) -> Tensor:
    """Resize a frame to ``size`` x ``size`` as Pillow's antialiased bilinear filter does, within one level.

    Args:
        frame: RGB, ``(H, W, 3)`` uint8.

    Returns:
        ``(3, size, size)`` uint8 on the CPU.
    """
    # torch shares memory with arrays, and warns of those that are read-only; these are copied.
    writable = np.require(frame, requirements=["C", "W"])
    image = torch.from_numpy(writable).permute(2, 0, 1).unsqueeze(0)
    resized = functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return resized.squeeze(0)


def normalise(images: Tensor, normalisation: Normalisation, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale uint8 RGB, ``(..., 3, H, W)``, to ``dtype``: (x / 255 - mean) / deviation.

    Args:
        normalisation: That of the weights, ``IMCNetConfig.normalisation``.
    """
    mean, deviation = (
        torch.tensor(values, dtype=dtype, device=images.device).view(3, 1, 1)
        for values in STATISTICS[normalisation]
    )
    return (images.to(dtype) / 255 - mean) / deviation


def resize_probability(probability: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring probabilities, ``(B, 1, h, w)`` in [0, 1], to ``size``, height and width: ``(B, 1, H, W)``."""
    return functional.interpolate(probability, size, mode="bilinear", align_corners=False)
