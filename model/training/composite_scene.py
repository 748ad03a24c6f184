"""The scene behind and in front of a composite's moving objects, and the rendering of frames and masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.training.cutouts import cut_by_alpha, cut_by_mask, paste
from model.training.motion import Floats, MovingCamera, MovingObject, Ripple, View
from model.training.pictures import Picture

_SHUTTER = (-1 / 3, 0.0, 1 / 3)  # moments that motion blur averages, in exposures


@dataclass(frozen=True)
class Thing:
    """An object to cut out by its hard mask or by its alpha."""

    picture: Picture
    edges: Literal["mask", "alpha"]

    def cut(self, rng: np.random.Generator, view: View, extent: float) -> Tensor:
        """A cut-out in the pixels of a view; ``extent`` as in ``cut_by_mask``."""
        cut = cut_by_mask if self.edges == "mask" else cut_by_alpha
        return cut(self.picture, rng, view, extent)


class Scene:
    """A background with things at rest on it and perhaps one in front, seen by a moving camera.

    Args:
        pan: Motion of the background in the frame, in half sides a step.
        ripples: Whether the background and the things on it move like water or leaves.
    """

    def __init__(
        self, background: Picture, pan: Floats, rng: np.random.Generator, view: View, *, ripples: bool
    ) -> None:
        side = background.pixels.shape[1]
        self._view = view
        self._camera = MovingCamera(pan, rng, view)
        # Things at rest are pasted in the background's pixels, of which the frame shows a part.
        self._own_view = View(round(side / self._camera.zoom), view.aspect)
        self._backdrop = background.pixels.float()  # colours and saliency
        if rng.random() < 0.5:
            self._backdrop = self._backdrop.flip(2)
        self._backdrop[3] /= 255
        self._front: Tensor | None = None
        self._waves = _Waves.random(rng) if ripples else None

    def rest(self, thing: Thing, rng: np.random.Generator, extent: float) -> None:
        """Put a thing at rest at a random place in the frame."""
        paste(self._backdrop, thing.cut(rng, self._own_view, extent), self._somewhere(rng))

    def occlude(self, thing: Thing, rng: np.random.Generator, *, near: Floats) -> None:
        """Put a thing in front of the objects, close to a place in the frame."""
        self._front = torch.zeros_like(self._backdrop)
        cut = thing.cut(rng, self._own_view, rng.uniform(0.1, 0.3))
        paste(self._front, cut, self._camera.in_picture(near + rng.uniform(-0.35, 0.35, size=2)))

    def at(self, times: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """Background and foreground layer (None without occluder), ``(times, 4, size, size)`` each.

        The fourth channel is saliency in the background and opacity in the foreground layer, in [0, 1].
        """
        disturbance = None if self._waves is None else self._waves.at
        maps = [self._camera.map(time, disturbance) for time in times]
        backdrop = self._view.sample(self._backdrop, maps, outside="reflection")
        if self._front is None:
            return backdrop, None
        maps = [self._camera.map(time) for time in times]
        return backdrop, self._view.sample(self._front, maps, outside="zeros")

    def _somewhere(self, rng: np.random.Generator) -> Floats:
        return self._camera.in_picture(rng.uniform(-0.85, 0.85, size=2))


@dataclass(frozen=True)
class _Waves:
    """Ripples, everywhere or to one side of a line."""

    ripple: Ripple
    fineness: float
    pace: float
    line: Floats  # slopes of their strength along x and y, and its value at the middle

    @classmethod
    def random(cls, rng: np.random.Generator) -> "_Waves":
        everywhere = rng.random() < 0.4
        angle = rng.normal(np.pi / 2, 0.5)  # mostly downwards, as water lies
        line = [0, 0, 1] if everywhere else [3 * np.cos(angle), 3 * np.sin(angle), rng.uniform(-1, 2)]
        ripple = Ripple.random(rng, rng.uniform(0.02, 0.07))
        return cls(ripple, rng.uniform(2, 4.5), rng.uniform(1, 3), np.array(line))

    def at(self, time: float, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        share = np.clip(self.line[0] * x + self.line[1] * y + self.line[2], 0, 1)
        moved_x, moved_y = self.ripple.at(time * self.pace, self.fineness * x, self.fineness * y)
        return share * moved_x, share * moved_y


def render(
    scene: Scene, objects: Sequence[MovingObject], times: Sequence[float], exposure: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames, ``(T, 3, size, size)``, and moving and salient shares of pixels, ``(T, size, size)``.

    Args:
        exposure: Shutter time around each of ``times``, in steps; 0 for no motion blur.
    """
    moments = [time + exposure * share for time in times for share in (_SHUTTER if exposure else (0,))]
    picture, front = scene.at(moments)
    moving = torch.zeros_like(picture[:, 3:])
    for thing in objects:
        layer = thing.at(moments)
        through = 1 - layer[:, 3:]
        picture.mul_(through).add_(layer)
        moving.mul_(through).add_(layer[:, 3:])
    if front is not None:
        through = 1 - front[:, 3:]
        picture.mul_(through).add_(front)
        moving.mul_(through)
    if exposure:
        picture, moving = (
            shares.view(len(times), -1, *shares.shape[1:]).mean(dim=1) for shares in (picture, moving)
        )
    return picture[:, :3], moving[:, 0], picture[:, 3]


def flicker(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """Change the brightness from frame to frame."""
    return frames * torch.from_numpy(rng.normal(1, 0.05, size=(len(frames), 1, 1, 1)).astype(np.float32))


def pass_shadow(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """Let a soft shadow pass over everything, like that of a cloud: it moves, but is not an object."""
    count, size = len(frames), frames.shape[-1]
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    place, velocity, radius = rng.uniform(-1, 1, size=2), rng.normal(0, 0.2, size=2), rng.uniform(0.2, 0.8)
    depth = rng.uniform(0.2, 0.5)
    gain = np.empty((count, 1, size, size), np.float32)
    for number in range(count):
        x, y = place + velocity * (number - count // 2)
        across, down = (np.exp(-(((axis - middle) / radius) ** 2)) for middle in (x, y))
        gain[number, 0] = 1 - depth * np.outer(down, across)
    return frames * torch.from_numpy(gain)
