"""From frames to the network's input, and from its probabilities to those of the frame's own pixels."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# ImageNet's statistics, with which the backbone was trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


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


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale uint8 RGB, ``(..., 3, H, W)``, to ``dtype`` with ImageNet's mean and standard deviation."""
    mean = torch.tensor(MEAN, dtype=dtype, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, dtype=dtype, device=images.device).view(3, 1, 1)
    return (images.to(dtype) / 255 - mean) / std


def resize_probability(probability: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring probabilities, ``(B, 1, h, w)`` in [0, 1], to ``size``, height and width: ``(B, 1, H, W)``."""
    return functional.interpolate(probability, size, mode="bilinear", align_corners=False)
