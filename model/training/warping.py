"""Affine sampling of pictures, and a camera that moves them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Camera:
    """Moves the frames of a window against each other, like a hand-held camera.

    Args:
        still: Probability that nothing moves.
        pan: Standard deviation of the steady motion a frame, in half sides; half for rotation and zoom.
        shake: Standard deviation of the unsteady motion, in half sides; half for rotation and zoom.
    """

    still: float = 0.25
    pan: float = 0.03
    shake: float = 0.006

    def path(self, frames: int, aspect: float, rng: np.random.Generator) -> list[Tensor]:
        """For each frame, an affine map of sample places, homogeneous: ``(3, 3)``."""
        if rng.random() < self.still:
            return [torch.eye(3)] * frames
        times = np.arange(frames)[:, None] - (frames - 1) / 2
        # x, y, angle, magnification
        steady = rng.normal(0, [self.pan, self.pan, self.pan / 2, self.pan / 2])
        unsteady = rng.normal(0, [self.shake, self.shake, self.shake / 2, self.shake / 2], size=(frames, 4))
        return [_affine(*place, aspect=aspect) for place in times * steady + unsteady]


HANDHELD = Camera()


def _affine(x: float, y: float, angle: float, growth: float, *, aspect: float) -> Tensor:
    """A small shift, rotation and zoom in a picture's own proportions; homogeneous, ``(3, 3)``."""
    cosine, sine = np.exp(-growth) * np.cos(angle), np.exp(-growth) * np.sin(angle)
    return torch.tensor(
        [[cosine, -sine / aspect, x], [sine * aspect, cosine, y], [0, 0, 1]], dtype=torch.float32
    )


def warp(stack: Tensor, placement: Tensor, size: int) -> Tensor:
    """Sample pictures, ``(N, C, side, side)``, at an affine grid: ``(N, C, size, size)``."""
    source_pixels = stack.shape[-1] / size * float(placement[:, :2].square().sum(dim=1).sqrt().min())
    if source_pixels >= 2:  # per pixel of the sample: too many for bilinear sampling, which sees two
        stack = functional.avg_pool2d(stack, int(source_pixels))
    channels = stack.flatten(0, 1).unsqueeze(0)  # one picture of many channels, which share the grid
    grid = functional.affine_grid(placement.unsqueeze(0), [1, 1, size, size], align_corners=False)
    warped = functional.grid_sample(channels, grid, padding_mode="reflection", align_corners=False)
    return warped.view(*stack.shape[:2], size, size)
