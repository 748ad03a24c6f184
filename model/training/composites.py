"""Windows made of stills: objects cut out of photos move over other pictures, with exact ground truth.

Motion alone tells what is foreground: other cut-outs rest on the background and move as it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.training.cutouts import cut_out, limit_side, paste
from model.training.motion import (
    Floats,
    MovingCamera,
    MovingObject,
    Ripple,
    View,
    random_pan,
    random_velocity,
)
from model.training.pictures import Picture, PictureSource
from model.training.samples import Sample
from model.windows import WindowLayout

_ASPECTS = (1.0, 1.8)  # of frames, before they are squeezed to squares
_SPEEDS = (0.015, 0.13)  # of an object across the background, in sides a step: as DAVIS moves at stride 4
_EXPOSURES = (0.1, 0.3)  # steps for which the shutter is open, where motion blurs
_SHUTTER = (-1 / 3, 0.0, 1 / 3)  # what is averaged then, in exposures


@dataclass(frozen=True)
class Mix:
    """How often composites show what; all are probabilities.

    Args:
        video_background: The background is a frame of a video instead of another still, where there are any.
        following: The camera follows the object, so that it is the background that moves most.
        second_object: Another object moves in its own way, and is foreground too.
        distractor: A cut-out rests on the background; as likely again, a second one.
        occluder: A cut-out that moves as the background does stands in front of the objects.
        motion_blur: The shutter is open long enough for motion to blur.
        defocus: The background is out of focus.
        flicker: Brightness changes from frame to frame.
        noise: The camera adds noise.
    """

    video_background: float = 0.5
    following: float = 0.4
    second_object: float = 0.2
    distractor: float = 0.3
    occluder: float = 0.2
    motion_blur: float = 0.25
    defocus: float = 0.15
    flicker: float = 0.4
    noise: float = 0.4


class Composites:
    """One window for each still, in which its object moves; what else is shown is drawn at random.

    Args:
        stills: Pictures with an object each.
        videos: More pictures to serve as backgrounds.

    Raises:
        ValueError: There are fewer than two stills, or ``num_frames`` is not odd and positive.
    """

    def __init__(
        self,
        stills: PictureSource,
        *,
        videos: PictureSource | None = None,
        num_frames: int = 3,
        mix: Mix = Mix(),
    ) -> None:
        if len(stills) < 2:
            raise ValueError(f"composites need at least two stills, got {len(stills)}")
        self._stills = stills
        self._videos = videos
        self._times = WindowLayout(num_frames, frame_stride=1).offsets
        self._mix = mix

    def __len__(self) -> int:
        return len(self._stills)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        """A window in which the object of a still moves; the masks hold what is visible of moving objects."""
        mix, view = self._mix, View(size, rng.uniform(*_ASPECTS))

        def another() -> Tensor:
            return cut_out(self._other_still(index, rng, size), rng, view)

        motion = random_velocity(rng, *_SPEEDS)
        pan = random_pan(rng, motion, following=rng.random() < mix.following)
        objects = [MovingObject(cut_out(self._stills.read(index, size), rng, view), pan + motion, rng, view)]
        if rng.random() < mix.second_object:
            objects.append(MovingObject(another(), pan + random_velocity(rng, *_SPEEDS), rng, view))

        scenery = _Scenery(self._background(index, rng, size), pan, rng, view)
        if rng.random() < mix.distractor:
            scenery.add_distractor(another(), rng)
            if rng.random() < mix.distractor:
                scenery.add_distractor(another(), rng)
        if rng.random() < mix.defocus:
            scenery.defocus()
        if rng.random() < mix.occluder:
            scenery.add_occluder(another(), rng, near=objects[0].place)

        exposure = rng.uniform(*_EXPOSURES) if rng.random() < mix.motion_blur else 0
        frames, coverage = _expose(scenery, objects, self._times, exposure)
        if rng.random() < mix.flicker:
            gains = rng.normal(1, 0.04, size=(len(frames), 1, 1, 1)).astype(np.float32)
            frames = frames * torch.from_numpy(gains)
        if rng.random() < mix.noise:
            grain = rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(rng.uniform(1, 5))
            frames = frames + torch.from_numpy(grain)
        masks = (coverage >= 0.5).to(torch.uint8) * 255
        return Sample(frames.add(0.5).clamp(0, 255).to(torch.uint8), masks, side_masks=masks)

    def _other_still(self, index: int, rng: np.random.Generator, size: int) -> Picture:
        other = int(rng.integers(len(self._stills) - 1))
        return self._stills.read(other + (other >= index), size)

    def _background(self, index: int, rng: np.random.Generator, size: int) -> Picture:
        if self._videos is not None and rng.random() < self._mix.video_background:
            return self._videos.read(int(rng.integers(len(self._videos))), size)
        return self._other_still(index, rng, size)


class _Scenery:
    """The background with what rests on it, and what stands in front of objects, seen by a moving camera."""

    def __init__(self, picture: Picture, pan: Floats, rng: np.random.Generator, view: View) -> None:
        self._backdrop = picture.pixels[:3].float()
        self._front: Tensor | None = None
        self._view = view
        self._camera = MovingCamera(pan, rng, view)
        self._unrest = Ripple.random(rng, 0.02 if rng.random() < 0.2 else 0)  # of water or leaves
        if rng.random() < 0.5:
            self._backdrop = self._backdrop.flip(2)

    def add_distractor(self, cut: Tensor, rng: np.random.Generator) -> None:
        paste(self._backdrop, cut, self._camera.in_picture(rng.uniform(-0.8, 0.8, size=2)))

    def add_occluder(self, cut: Tensor, rng: np.random.Generator, *, near: Floats) -> None:
        """Let something of up to about half a side stand close to a place of the frame."""
        side = self._backdrop.shape[1]
        self._front = torch.zeros(4, side, side)
        place = self._camera.in_picture(near + rng.uniform(-0.35, 0.35, size=2))
        paste(self._front, limit_side(cut, 0.35 * side), place)

    def defocus(self) -> None:
        for _ in range(2):
            self._backdrop = functional.avg_pool2d(
                self._backdrop, kernel_size=3, stride=1, padding=1, count_include_pad=False
            )

    def at(self, times: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """The background, ``(times, 3, size, size)``, and a cut-out of what is in front, at each time."""
        maps = [self._camera.map(time, self._ripple) for time in times]
        backdrop = self._view.sample(self._backdrop, maps, outside="reflection")
        front = None if self._front is None else self._view.sample(self._front, maps, outside="zeros")
        return backdrop, front

    def _ripple(self, time: float, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        return self._unrest.at(time, 3 * x, 3 * y)


def _expose(
    scenery: _Scenery, objects: Sequence[MovingObject], times: Sequence[float], exposure: float
) -> tuple[Tensor, Tensor]:
    """Frames, ``(T, 3, size, size)``, and how much of each pixel moving objects fill, ``(T, size, size)``.

    Args:
        exposure: How long the shutter is open around each of ``times``; at 0, nothing blurs.
    """
    moments = [time + exposure * share for time in times for share in (_SHUTTER if exposure else (0,))]
    backdrop, front = scenery.at(moments)
    # Coverage is a fourth channel: an object's is its opacity, that of all else is 0.
    picture = functional.pad(backdrop, (0, 0, 0, 0, 0, 1))
    for thing in objects:
        layer = thing.at(moments)
        picture = torch.addcmul(layer, picture, 1 - layer[:, 3:])
    if front is not None:
        hidden, front[:, 3:] = front[:, 3:].clone(), 0
        picture = torch.addcmul(front, picture, 1 - hidden)
    exposed = picture.view(len(times), -1, *picture.shape[1:]).mean(dim=1)
    return exposed[:, :3], exposed[:, 3]
