"""The motion set: clips in which motion alone tells which of several salient things is the foreground.

A clip has 13 frames. One cut-out of a photo moves over a frame of a video. Other cut-outs, equally salient,
rest on that frame and move with the camera only. Training never sees these photos and videos. A clip is the
same in every run, except for rounding in the libraries that decode and resize.

Places run from -1 to 1 and time is counted in steps, as in ``model.training.motion``. A frame is a quarter of
a step: a window of frames four apart moves as far as one of the composites that networks are trained with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from model.datasets import Still, VideoSequence, read_frame, read_mask
from model.training.cutouts import cut_out, limit_side, paste
from model.training.motion import Floats, MovingCamera, MovingObject, View, random_velocity
from model.training.pictures import Picture

Kind = Literal["crowd", "plain", "following"]

KINDS: tuple[Kind, ...] = ("crowd", "plain", "following")
FRAMES, HEIGHT, WIDTH = 13, 270, 480

# Seeds of the clips of each kind, chosen from 0 to 9 by how the clips look, before any network was scored on
# them. Left out are clips with cut-off bodies, with things that hide each other, and with black backgrounds.
_SEEDS: dict[Kind, tuple[int, ...]] = {
    "crowd": (0, 1, 2, 5, 8),
    "plain": (0, 1, 3, 6, 8),
    "following": (1, 2, 4, 7, 8),
}
_TIMES = tuple((index - FRAMES // 2) / 4 for index in range(FRAMES))
_VIEW = View(WIDTH, WIDTH / HEIGHT)  # clips are rendered as squares, then squeezed to their height
_PICTURE_SIDE = 640  # of the squares that pictures are read as: the view sees a part of them
_SPEEDS = (0.03, 0.13)  # of the mover across the background, in sides a step
_PANS = (0.003, 0.03)  # of a camera that does not follow
_STILL_CAMERA = 0.5  # share of cameras that only shake, of those that do not follow
_LONGEST = 0.75  # side of a cut-out, in sides of the view
_EVERY_NTH = 7  # backgrounds are every so many frames of a video


@dataclass(frozen=True)
class MotionClip:
    """A rendered clip.

    Args:
        frames: RGB, ``(13, 270, 480, 3)`` uint8.
        masks: Visible part of the mover, ``(13, 270, 480)`` bool.
        resting: Visible part of the salient things at rest, same shape and type.
    """

    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    resting: NDArray[np.bool_]


def clip_names() -> tuple[str, ...]:
    """``crowd-1`` to ``following-5``: the kind, and a number from 1 on."""
    return tuple(f"{kind}-{number}" for kind in KINDS for number, _ in enumerate(_SEEDS[kind], start=1))


def kind_of(name: str) -> Kind:
    """The kind of the clip ``name``.

    Raises:
        ValueError: There is no such clip.
    """
    if name not in clip_names():
        raise ValueError(f"no clip is called {name}; there are {', '.join(clip_names())}")
    return next(kind for kind in KINDS if name.startswith(kind))


class MotionClips:
    """Renders the clips.

    Args:
        stills: Photos of one object each. Those with the same prefix, up to ``_``, show similar things.
        videos: Annotated sequences, whose frames serve as backgrounds.
    """

    def __init__(self, stills: Sequence[Still], videos: Sequence[VideoSequence]) -> None:
        self._stills = sorted(stills, key=lambda still: still.image.stem)
        self._backgrounds = [
            Still(frame, mask)
            for video in sorted(videos, key=lambda video: video.name)
            for frame, mask in list(zip(video.frames, video.masks, strict=True))[::_EVERY_NTH]
            if mask is not None
        ]

    def render(self, name: str) -> MotionClip:
        """Render the clip ``name``.

        Raises:
            ValueError: There is no such clip.
            DatasetError: A picture cannot be read.
        """
        kind = kind_of(name)
        return self._render(kind, _SEEDS[kind][int(name.removeprefix(f"{kind}-")) - 1])

    def _render(self, kind: Kind, seed: int) -> MotionClip:
        rng = np.random.default_rng((KINDS.index(kind), seed))
        motion = random_velocity(rng, *_SPEEDS)
        pan = _random_pan(rng, motion, following=kind == "following")
        mover, resting = self._cast(kind, rng)
        places = _places(rng, 1 + len(resting))
        scenery = _Scenery(self._background(rng), pan, rng)
        for cut, place in zip(resting, places[1:], strict=True):
            scenery.add(cut, place)
        moving = MovingObject(mover, pan + motion, rng, _VIEW, place=places[0])
        return _compose(scenery.at(_TIMES), moving.at(_TIMES))

    def _cast(self, kind: Kind, rng: np.random.Generator) -> tuple[Tensor, list[Tensor]]:
        """The cut-outs of the mover and of the things at rest."""
        if kind == "crowd":
            alike = self._similar_stills(rng)
            mover = self._cut(alike, rng)
            return mover, [_resized(self._cut(alike, rng), mover) for _ in range(rng.integers(3, 5))]
        mover = self._cut(self._stills, rng)
        if kind == "plain":
            mover = _filled(mover, self._background(rng), rng)
        return mover, [self._cut(self._stills, rng) for _ in range(rng.integers(2, 4))]

    def _similar_stills(self, rng: np.random.Generator) -> list[Still]:
        chosen = self._stills[rng.integers(len(self._stills))]
        return [still for still in self._stills if _group(still) == _group(chosen)]

    def _cut(self, stills: Sequence[Still], rng: np.random.Generator) -> Tensor:
        picture = _read_picture(stills[int(rng.integers(len(stills)))])
        return limit_side(cut_out(picture, rng, _VIEW), _LONGEST * _VIEW.size)

    def _background(self, rng: np.random.Generator) -> Picture:
        return _read_picture(self._backgrounds[rng.integers(len(self._backgrounds))])


class _Scenery:
    """A background with the cut-outs that rest on it, seen by a moving camera."""

    def __init__(self, picture: Picture, pan: Floats, rng: np.random.Generator) -> None:
        colours, coverage = picture.pixels[:3].float(), picture.pixels[3:].float() / 255
        self._backdrop = torch.cat([colours, coverage])  # salient things in the picture itself rest as well
        self._camera = MovingCamera(pan, rng, _VIEW, zoom=(1.3, 1.7))

    def add(self, cut: Tensor, place: Floats) -> None:
        """Let a cut-out rest where the view sees it at ``place`` at time 0, in its size, but for relief."""
        scale = self._backdrop.shape[1] / (self._camera.zoom * _VIEW.size)
        paste(self._backdrop, _scaled(cut, scale), self._camera.in_picture(place))

    def at(self, times: Sequence[float]) -> Tensor:
        """Colours, and the share of each pixel that salient things fill, ``(times, 4, size, size)``."""
        maps = [self._camera.map(time) for time in times]
        return _VIEW.sample(self._backdrop, maps, outside="reflection")


def _random_pan(rng: np.random.Generator, motion: Floats, *, following: bool) -> Floats:
    """Velocity of the background in the view, for a mover that moves by ``motion`` across it."""
    if following:
        return -rng.uniform(0.7, 1.0) * motion
    return np.zeros(2) if rng.random() < _STILL_CAMERA else random_velocity(rng, *_PANS)


def _places(rng: np.random.Generator, count: int) -> Floats:
    """Places side by side, in random order, ``(count, 2)``."""
    x = np.linspace(-0.7, 0.7, count) + rng.uniform(-0.1, 0.1, size=count)
    y = rng.uniform(0, 0.4) + rng.uniform(-0.2, 0.2, size=count)
    return rng.permutation(np.stack([x, y], axis=1))


def _compose(scenery: Tensor, mover: Tensor) -> MotionClip:
    opacity = mover[:, 3:]
    colours = mover[:, :3] + scenery[:, :3] * (1 - opacity)
    layers = torch.cat([colours, opacity, scenery[:, 3:] * (1 - opacity)], dim=1)
    layers = functional.interpolate(layers, (HEIGHT, WIDTH), mode="bilinear", antialias=True)
    return MotionClip(
        frames=layers[:, :3].add(0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(),
        masks=(layers[:, 3] >= 0.5).numpy(),
        resting=(layers[:, 4] >= 0.5).numpy(),
    )


def _filled(cut: Tensor, picture: Picture, rng: np.random.Generator) -> Tensor:
    """Replace the colours of a cut-out by a piece of a picture."""
    side = int(rng.uniform(0.3, 0.8) * _PICTURE_SIDE)
    top, left = rng.integers(0, _PICTURE_SIDE - side + 1, size=2)
    piece = picture.pixels[None, :3, top : top + side, left : left + side].float()
    colours = functional.interpolate(piece, cut.shape[1:], mode="bilinear", antialias=True)[0]
    return torch.cat([(colours * rng.uniform(0.7, 1.3)).clamp(0, 255) * cut[3:], cut[3:]])


def _resized(cut: Tensor, like: Tensor) -> Tensor:
    """Scale a cut-out to the area of another one; its proportions stay the same."""
    return _scaled(cut, float(np.sqrt(np.prod(like.shape[1:]) / np.prod(cut.shape[1:]))))


def _scaled(cut: Tensor, scale: float) -> Tensor:
    size = [max(4, round(side * scale)) for side in cut.shape[1:]]
    return functional.interpolate(cut.unsqueeze(0), size, mode="bilinear", antialias=True).squeeze(0)


def _group(still: Still) -> str:
    return still.image.stem.split("_")[0]


def _read_picture(still: Still) -> Picture:
    image, foreground = Image.fromarray(read_frame(still.image)), Image.fromarray(read_mask(still.mask))
    size = (_PICTURE_SIDE, _PICTURE_SIDE)
    colours = image.resize(size, Image.Resampling.BILINEAR)
    coverage = foreground.convert("L").resize(size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.dstack([np.asarray(colours), np.asarray(coverage)]))
    return Picture(pixels.permute(2, 0, 1).contiguous(), image.width / image.height)
