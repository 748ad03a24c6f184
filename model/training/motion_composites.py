"""Windows composed of cut-outs and stills, in which often only motion tells what is foreground.

The masks show the objects that move on their own. The side masks show everything salient, moving or not. If
nothing moves on its own, the masks show what is salient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from model.training.augmentation import Augmentation
from model.training.composite_scene import Scene, Thing, flicker, pass_shadow, render
from model.training.cutouts import fill, is_cut_off
from model.training.motion import Floats, MovingObject, View, random_pan, random_velocity
from model.training.pictures import Picture
from model.training.samples import Sample
from model.training.stored_pictures import StoredPictures, prefix
from model.windows import WindowLayout

Kind = Literal["ordinary", "crowd", "plain", "following", "resting", "rippling"]

_ALIKE = ("ccp", "human", "people", "pets", "cats", "cow")  # data sets of objects that look alike
_ASPECTS = (1.0, 1.8)  # of frames, before they are squeezed to squares
_EXTENTS = (0.13, 0.6)  # square root of a thing's area, in sides of the frame
_SPEEDS = (0.015, 0.13)  # of a thing across the background, in sides a step: as DAVIS moves at stride 4
_EXPOSURES = (0.1, 0.3)  # shutter times of motion blur, in steps
CAMERA = Augmentation(colour=0.2, grey=0.1, blur=0.15, noise=0.4)
_LEAST = 0.004  # least foreground share of the centre frame
_TRIES = 3


@dataclass(frozen=True)
class MotionMix:
    """Weights of the kinds of windows, and probabilities of other effects.

    Args:
        ordinary: One thing moves; up to two others rest.
        crowd: One of several things that look alike moves.
        plain: A shape with the texture of a background moves; salient things rest.
        following: The camera follows the moving thing, so that the background moves most.
        resting: Only the camera moves.
        rippling: The background moves like water or leaves; the salient thing hardly moves.
        second_object: In an ordinary window, a second thing moves independently.
        occluder: A thing in front moves with the background.
        motion_blur: Motion blurs.
        light: Brightness changes from frame to frame.
        shadow: A shadow passes over everything.
    """

    ordinary: float = 0.26
    crowd: float = 0.20
    plain: float = 0.28
    following: float = 0.12
    resting: float = 0.08
    rippling: float = 0.06
    second_object: float = 0.15
    occluder: float = 0.15
    motion_blur: float = 0.15
    light: float = 0.4
    shadow: float = 0.1

    def __post_init__(self) -> None:
        if min(getattr(self, field.name) for field in fields(self)) < 0 or self.kinds().sum() <= 0:
            raise ValueError(f"weights and probabilities must be at least 0, with a kind above 0, got {self}")

    def kinds(self) -> Floats:
        return np.array([getattr(self, kind) for kind in get_args(Kind)])


class MotionComposites:
    """Random windows in which things move over a background on which others rest.

    The index is ignored: the generator decides alone.

    Args:
        stills: Pictures of a salient object, used as objects and as backgrounds.
        cutouts: Objects with true alpha.
        backgrounds: Sources of pictures that are backgrounds only, with their weights. A quarter of all
            backgrounds are stills.
        camera: Colours, blur and noise of the finished frames.

    Raises:
        ValueError: There are no stills, no cut-outs or no backgrounds, or ``num_frames`` is not odd and
            positive.
    """

    def __init__(
        self,
        stills: StoredPictures,
        cutouts: StoredPictures,
        backgrounds: Sequence[tuple[StoredPictures, float]],
        *,
        num_frames: int,
        mix: MotionMix = MotionMix(),
        camera: Augmentation = CAMERA,
    ) -> None:
        if not len(stills) or not len(cutouts) or not sum(len(source) for source, _ in backgrounds):
            raise ValueError("motion composites need stills, cut-outs and backgrounds")
        self._stills, self._cutouts, self._mix, self._camera = stills, cutouts, mix, camera
        self._backgrounds = [source for source, _ in backgrounds]
        weights = np.array([weight for _, weight in backgrounds])
        self._weights = weights / weights.sum()
        self._groups = _groups(stills)
        self._times = WindowLayout(num_frames, frame_stride=1).offsets

    def __len__(self) -> int:
        return len(self._stills)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        """A window of any kind. One without foreground in its centre frame is drawn again, up to twice."""
        for _ in range(_TRIES):
            kind: Kind = rng.choice(get_args(Kind), p=self._mix.kinds() / self._mix.kinds().sum())
            sample = self._window(kind, rng, size)
            if (sample.masks[len(sample.masks) // 2] > 0).float().mean() >= _LEAST:
                break
        return sample

    def _window(self, kind: Kind, rng: np.random.Generator, size: int) -> Sample:
        mix, view = self._mix, View(size, rng.uniform(*_ASPECTS))
        motion = random_velocity(rng, 2 * _SPEEDS[0] if kind == "crowd" else _SPEEDS[0], _SPEEDS[1])
        pan = random_pan(rng, motion, following=kind == "following")
        scene = Scene(self._background(rng, size, kind), pan, rng, view, ripples=kind == "rippling")
        cuts = self._populate(scene, kind, rng, view)
        speeds = [0.1 * motion if kind == "rippling" else motion, random_velocity(rng, *_SPEEDS)]
        objects = [
            MovingObject(cut, pan + speed, rng, view) for cut, speed in zip(cuts, speeds, strict=False)
        ]
        if rng.random() < mix.occluder:
            near = objects[0].place if objects else np.zeros(2)
            scene.occlude(self._thing(rng, size), rng, near=near)
        exposure = rng.uniform(*_EXPOSURES) if rng.random() < mix.motion_blur else 0.0
        frames, moving, salient = render(scene, objects, self._times, exposure)
        shown = salient if kind in ("resting", "rippling") else moving
        masks, side_masks = ((share >= 0.5).to(torch.uint8) * 255 for share in (shown, salient))
        return Sample(self._exposed(frames, rng), masks, side_masks)

    def _populate(self, scene: Scene, kind: Kind, rng: np.random.Generator, view: View) -> list[Tensor]:
        """Put things at rest into a scene; return the cut-outs that move, two at most."""
        size, extent = view.size, _log_uniform(rng, *_EXTENTS)
        if kind == "crowd":
            extent = min(extent, 0.45)
            first, *others = self._alike(rng, size, 1 + int(rng.integers(2, 6)))
            for thing in others:
                scene.rest(thing, rng, extent * rng.uniform(0.75, 1.3))
            return [first.cut(rng, view, extent)]
        resting = {"ordinary": (0, 3), "rippling": (0, 1)}.get(kind, (1, 3))
        for _ in range(int(rng.integers(*resting))):
            scene.rest(self._thing(rng, size), rng, _log_uniform(rng, *_EXTENTS))
        if kind == "resting":
            return []
        cut = self._thing(rng, size).cut(rng, view, max(extent, 0.2) if kind == "rippling" else extent)
        if kind == "plain":
            return [fill(cut, self._texture(rng, size))]
        if kind == "ordinary" and rng.random() < self._mix.second_object:
            return [cut, self._thing(rng, size).cut(rng, view, _log_uniform(rng, *_EXTENTS))]
        return [cut]

    def _exposed(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        if rng.random() < self._mix.light:
            frames = flicker(frames, rng)
        if rng.random() < self._mix.shadow:
            frames = pass_shadow(frames, rng)
        return self._camera.degrade(self._camera.recolour(frames, rng), rng)

    def _thing(self, rng: np.random.Generator, size: int) -> Thing:
        """A cut-out, or the object of a still, preferably one that is not cut off."""
        if rng.random() < 0.4:
            return Thing(self._cutouts.read(int(rng.integers(len(self._cutouts))), size), "alpha")
        return self._whole(rng, size, range(len(self._stills)))

    def _whole(self, rng: np.random.Generator, size: int, of: Sequence[int]) -> Thing:
        for _ in range(_TRIES):
            picture = self._stills.read(of[int(rng.integers(len(of)))], size)
            if not is_cut_off(picture):
                break
        return Thing(picture, "mask")

    def _alike(self, rng: np.random.Generator, size: int, count: int) -> list[Thing]:
        """Things that look alike: copies of one thing, or things of one data set."""
        if not self._groups or rng.random() < 0.4:
            return [self._thing(rng, size)] * count
        names = sorted(self._groups)
        group = self._groups[names[int(rng.integers(len(names)))]]
        return [self._whole(rng, size, group) for _ in range(count)]

    def _background(self, rng: np.random.Generator, size: int, kind: Kind) -> Picture:
        if kind != "rippling" and rng.random() < 0.25:
            return self._stills.read(int(rng.integers(len(self._stills))), size)
        source = self._backgrounds[int(rng.choice(len(self._backgrounds), p=self._weights))]
        return source.read(int(rng.integers(len(source))), size)

    def _texture(self, rng: np.random.Generator, size: int) -> Tensor:
        """A part of a background, made brighter or darker."""
        picture = self._background(rng, size, "plain").pixels[:3]
        side = int(rng.uniform(0.3, 0.8) * picture.shape[1])
        top, left = rng.integers(0, picture.shape[1] - side + 1, size=2)
        return picture[:, top : top + side, left : left + side].float() * float(rng.uniform(0.7, 1.3))


def _groups(stills: StoredPictures) -> Mapping[str, Sequence[int]]:
    """Positions of the stills of each data set in ``_ALIKE`` that has at least two."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(stills.names):
        if prefix(name) in _ALIKE:
            places.setdefault(prefix(name), []).append(place)
    return {name: group for name, group in places.items() if len(group) > 1}


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
