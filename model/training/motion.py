"""How composites move: courses over time, ripples, and pictures sampled at moving places.

Places run from -1 to 1, from edge to edge, x to the right and y down. Time is counted in steps of the window,
0 at its centre.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Floats = NDArray[np.floating[Any]]
Disturbance = Callable[[float, Floats, Floats], tuple[Floats, Floats]]
"""Displacements in x and y at a time and at places x and y."""

_PANS = (0.003, 0.05)  # of a camera that does not follow the object, in sides a step
_STILL_CAMERA = 0.4  # share of cameras that only shake, of those that do not follow
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


def random_pan(rng: np.random.Generator, motion: Floats, *, following: bool) -> Floats:
    """Velocity of the background in the frame, for an object that moves by ``motion`` across it."""
    if following:
        return -rng.uniform(0.6, 1.1) * motion
    return np.zeros(2) if rng.random() < _STILL_CAMERA else random_velocity(rng, *_PANS)


class MovingObject:
    """A cut-out that moves, turns, grows, leans and bends.

    Args:
        velocity: x and y, in half sides a step.
        place: Its middle at time 0. Default: random.
    """

    def __init__(
        self,
        cut: Tensor,
        velocity: Floats,
        rng: np.random.Generator,
        view: View,
        *,
        place: Floats | None = None,
    ) -> None:
        self.place = rng.uniform(-0.6, 0.6, size=2) if place is None else place
        self._cut = cut
        self._view = view
        # From its middle, to the right and down.
        self._reach = (cut.shape[2] / view.size, cut.shape[1] / view.size)
        self._x = Course.random(rng, float(velocity[0]), 0.02)
        self._y = Course.random(rng, float(velocity[1]), 0.02)
        self._angle = Course.random(rng, rng.normal(0, 0.05), 0.04)
        self._growth = Course.random(rng, rng.normal(0, 0.03), 0.02)
        self._lean = Course.random(rng, rng.normal(0, 0.03), 0.03)
        self._bending = Ripple.random(rng, rng.uniform(0, 0.1))

    def at(self, times: Sequence[float]) -> Tensor:
        """A cut-out of the frame's size for each time: ``(times, 4, size, size)``."""
        return self._view.sample(self._cut, [self._map(time) for time in times], outside="zeros")

    def _map(self, time: float) -> tuple[Floats, Floats]:
        """Where the frame's nodes lie in the cut-out."""
        x, y = self._view.nodes()
        x, y = x - self.place[0] - self._x.at(time), y - self.place[1] - self._y.at(time)
        x, y = self._view.turn(x, y, self._angle.at(time), shrink=np.exp(-self._growth.at(time)))
        x, y = (x + self._lean.at(time) * y) / self._reach[0], y / self._reach[1]
        bent_x, bent_y = self._bending.at(time, x, y)
        return x + bent_x, y + bent_y


class MovingCamera:
    """Shows a moving, turning and zooming part of a picture; near things pass faster than far ones.

    Args:
        pan: Motion of the background in the frame, in half sides a step.
        zoom: Lowest and highest ratio of the picture's side to that of the part.
    """

    def __init__(
        self, pan: Floats, rng: np.random.Generator, view: View, *, zoom: tuple[float, float] = (1.1, 1.7)
    ) -> None:
        self.zoom = rng.uniform(*zoom)
        self._view = view
        self._middle = rng.uniform(-1, 1, size=2) * (1 - 1 / self.zoom)  # of the part that is seen
        self._x = Course.random(rng, float(pan[0]), 0.006)
        self._y = Course.random(rng, float(pan[1]), 0.006)
        self._angle = Course.random(rng, rng.normal(0, 0.012), 0.008)
        self._growth = Course.random(rng, rng.normal(0, 0.015), 0.006)
        self._relief = Ripple.random(rng, rng.uniform(0, 0.4))

    def in_picture(self, place: Floats) -> Floats:
        """Where a place of the frame lies in the picture at time 0, nearly."""
        return self._middle + place / self.zoom

    def map(self, time: float, disturbance: Disturbance | None = None) -> tuple[Floats, Floats]:
        """Where the frame's nodes lie in the picture.

        Args:
            disturbance: Moves places on top, in half sides of the frame.
        """
        x, y = self._view.nodes()
        shift_x, shift_y = self._x.at(time), self._y.at(time)
        nearness, _ = self._relief.at(0, x - shift_x, y - shift_y)
        x, y = x - shift_x * (1 + nearness), y - shift_y * (1 + nearness)
        x, y = self._view.turn(x, y, self._angle.at(time), shrink=np.exp(-self._growth.at(time)))
        if disturbance is not None:
            moved_x, moved_y = disturbance(time, x, y)
            x, y = x + moved_x, y + moved_y
        return self._middle[0] + x / self.zoom, self._middle[1] + y / self.zoom
