"""How composites move: courses over time, ripples, and pictures sampled at moving places.

Places run from -1 to 1, from edge to edge, x to the right and y down. Time is counted in steps of the window,
0 at its centre.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Floats = NDArray[np.floating[Any]]

_NODES = 17  # a side: maps are computed at this many places and interpolated in between


@dataclass(frozen=True)
class View:
    """The square frame that is rendered.

    Args:
        size: Its side in pixels.
        aspect: Width by height of what it shows, which was squeezed to a square.
    """

    size: int
    aspect: float

    def nodes(self) -> tuple[Floats, Floats]:
        """x and y of places from the first pixel's middle to the last one's, ``(nodes, nodes)`` each."""
        axis = np.linspace(-1 + 1 / self.size, 1 - 1 / self.size, _NODES)
        x, y = np.meshgrid(axis, axis)
        return x, y

    def turn(self, x: Floats, y: Floats, angle: float, shrink: float) -> tuple[Floats, Floats]:
        """Turn places around the origin and shrink their distances, in the proportions before the squeeze."""
        x = x * self.aspect
        turned_x = shrink * (np.cos(angle) * x + np.sin(angle) * y) / self.aspect
        turned_y = shrink * (np.cos(angle) * y - np.sin(angle) * x)
        return turned_x, turned_y

    def sample(
        self,
        picture: Tensor,
        maps: Sequence[tuple[Floats, Floats]],
        *,
        outside: Literal["zeros", "reflection"],
    ) -> Tensor:
        """See a picture through maps.

        Args:
            picture: ``(C, h, w)``.
            maps: For each moment, where ``nodes`` lie in the picture: x and y.

        Returns:
            ``(moments, C, size, size)``.
        """
        coarse = torch.from_numpy(np.array(maps, np.float32))
        grid = functional.interpolate(coarse, (self.size, self.size), mode="bilinear", align_corners=True)
        return functional.grid_sample(
            picture.expand(len(maps), *picture.shape),
            grid.permute(0, 2, 3, 1),
            padding_mode=outside,
            align_corners=False,
        )


@dataclass(frozen=True)
class Course:
    """A quantity that changes steadily and swings on top; 0 at time 0."""

    rate: float
    swing: float
    pace: float  # radians a step
    phase: float

    @classmethod
    def random(cls, rng: np.random.Generator, rate: float, swing: float) -> Self:
        """One that swings by about ``swing``."""
        return cls(rate, rng.normal(0, swing), rng.uniform(0.5, 2), rng.uniform(0, 2 * np.pi))

    def at(self, time: float) -> float:
        swung = np.sin(self.pace * time + self.phase) - np.sin(self.phase)
        return float(self.rate * time + self.swing * swung)


@dataclass(frozen=True)
class Ripple:
    """A smooth field of displacements that swings over time: two waves each in x and y, ``strength`` high."""

    strength: float
    waves: Floats  # (2, 2, 4): direction, wave; of the wave: frequencies along x and y, pace, phase

    @classmethod
    def random(cls, rng: np.random.Generator, strength: float) -> Self:
        return cls(strength, rng.uniform((-3, -3, -1.5, 0), (3, 3, 1.5, 2 * np.pi), size=(2, 2, 4)))

    def at(self, time: float, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Displacements in x and y at the places ``x`` and ``y``."""
        along_x, along_y, pace, phase = np.moveaxis(self.waves, -1, 0)[..., None, None]
        shifts = np.sin(along_x * x + along_y * y + pace * time + phase).sum(axis=1)
        shift_x, shift_y = self.strength / 2 * shifts
        return shift_x, shift_y


def random_velocity(rng: np.random.Generator, slowest: float, fastest: float) -> Floats:
    """A velocity, x and y, in any direction; its bounds are in sides a step, and it is slow more often."""
    speed = 2 * np.exp(rng.uniform(np.log(slowest), np.log(fastest)))  # a side is 2 long
    direction = rng.uniform(0, 2 * np.pi)
    return np.array([speed * np.cos(direction), speed * np.sin(direction)])
