"""Windows of real videos and stills, varied anew each time: flipped, turned, zoomed, recoloured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.training.pictures import Picture, PictureSource
from model.training.samples import Sample
from model.training.warping import HANDHELD, Camera, warp
from model.windows import WindowLayout


@dataclass(frozen=True)
class Augmentation:
    """How much samples are varied. The paper flips, turns and scales; recolouring helps small data sets.

    Args:
        flip: Probability of mirroring left and right.
        rotation: Probability of turning by up to ``max_degrees`` either way.
        zoom: Smallest and largest magnification; a random part is shown, mirrored at the picture's edges.
        colour: Brightness, contrast and saturation change by up to this share.
        grey: Probability of losing all colour.
        blur: Probability of losing detail, as a smaller picture does that is magnified.
        noise: Probability of sensor noise, which differs in every frame.
        occlusion: Probability of a plain shape in front, at the same place in every frame. It hides at most
            half of the foreground.
    """

    flip: float = 0.5
    rotation: float = 0.2
    max_degrees: float = 15
    zoom: tuple[float, float] = (0.75, 4 / 3)
    colour: float = 0.2
    grey: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    occlusion: float = 0.0

    def apply(
        self,
        pictures: Sequence[Picture],
        rng: np.random.Generator,
        size: int,
        *,
        camera: Camera | None = None,
    ) -> Sample:
        """Make one sample of all pictures, with the same variation for each.

        Hard annotations stay hard: the warped mask is thresholded at one half. Soft ones stay soft.

        Args:
            camera: Also moves the frames against each other. Default: no motion between them.
        """
        stack = torch.stack([picture.pixels for picture in pictures]).float()
        placement = self._placement(pictures[0].aspect, rng)
        if camera is None:
            warped = warp(stack, placement, size)
        else:
            places = [placement @ moved for moved in camera.path(len(pictures), pictures[0].aspect, rng)]
            warped = torch.cat(
                [warp(one.unsqueeze(0), place, size) for one, place in zip(stack, places, strict=True)]
            )
        frames = warped[:, :3]
        soft = torch.tensor([picture.soft for picture in pictures]).view(-1, 1, 1)
        masks = torch.where(soft, warped[:, 3], (warped[:, 3] >= 127.5) * 255.0)
        frames = self.recolour(frames, rng)
        # Options that are off draw no random numbers, so that adding one leaves samples unchanged.
        if self.occlusion and rng.random() < self.occlusion:
            frames, masks = _occlude(frames, masks, rng)
        masks = masks.add(0.5).to(torch.uint8)
        return Sample(self.degrade(frames, rng), masks, side_masks=masks)

    def _placement(self, aspect: float, rng: np.random.Generator) -> Tensor:
        """Where a sample's pixels lie in the picture, both from -1 to 1: an affine map, ``(2, 3)``."""
        mirrored = -1 if rng.random() < self.flip else 1
        turned = rng.random() < self.rotation
        angle = np.deg2rad(rng.uniform(-self.max_degrees, self.max_degrees)) if turned else 0.0
        shown = 1 / np.exp(rng.uniform(*np.log(self.zoom)))
        x, y = rng.uniform(-1, 1, size=2) * abs(1 - shown)
        # The picture is turned in its own proportions, not in those of the square.
        cosine, sine = shown * np.cos(angle), shown * np.sin(angle)
        return torch.tensor(
            [[mirrored * cosine, -sine / aspect, x], [mirrored * sine * aspect, cosine, y]],
            dtype=torch.float32,
        )

    def recolour(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """Change brightness, contrast and saturation of all frames, ``(T, 3, H, W)``, in the same way."""
        brightness, contrast, saturation = rng.uniform(1 - self.colour, 1 + self.colour, size=3)
        frames = frames * brightness
        frames = torch.lerp(frames.mean(), frames, contrast)
        return torch.lerp(frames.mean(dim=1, keepdim=True), frames, saturation)

    def degrade(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """Degrade frames, ``(T, 3, H, W)``, like a camera: perhaps grey, blurred or noisy; returns uint8."""
        if self.grey and rng.random() < self.grey:
            frames = frames.mean(dim=1, keepdim=True).expand_as(frames)
        if self.blur and rng.random() < self.blur:
            frames = _lose_detail(frames, rng.uniform(1.5, 2.5))
        if self.noise and rng.random() < self.noise:
            grain = rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(rng.uniform(2, 10))
            frames = frames + torch.from_numpy(grain)
        return frames.add(0.5).clamp(0, 255).to(torch.uint8)


STRONG = Augmentation(zoom=(0.6, 1.4), colour=0.35, grey=0.1, blur=0.15, noise=0.2, occlusion=0.05)
"""For long runs on few videos: variety comes before length."""
UNVARIED = Augmentation(flip=0, rotation=0, zoom=(1, 1), colour=0)


class Windows:
    """Windows around every annotated frame of every video; at its ends, frames repeat as in ``WindowLayout``.

    Training needs the masks of all frames, so windows step over annotated frames: where a data set holds or
    annotates every fifth frame only, ``frame_stride`` counts those.
    """

    def __init__(
        self,
        pictures: PictureSource,
        *,
        num_frames: int = 3,
        frame_stride: int = 4,
        augmentation: Augmentation = Augmentation(),
    ) -> None:
        self._pictures = pictures
        self._layout = WindowLayout(num_frames, frame_stride)
        self._augmentation = augmentation
        self._centres = [(video, place) for video in pictures.videos for place in range(len(video))]

    def __len__(self) -> int:
        return len(self._centres)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        """The window around an annotated frame, varied."""
        video, centre = self._centres[index]
        places = self._layout.indices(centre, last=len(video) - 1)
        pictures = [self._pictures.read(video[place], size) for place in places]
        return self._augmentation.apply(pictures, rng, size)


class SequenceWindows:
    """Windows around any frame of any video; every video is equally likely.

    The index is ignored: the generator decides alone.

    Args:
        strides: Distances between the frames of a window, in frames of the original video, equally likely.
        frame_step: Frames of the original video from one picture to the next.
        reversal: Probability of turning a window's time around.

    Raises:
        ValueError: There are no videos, no strides, or a stride is less than 1.
    """

    def __init__(
        self,
        pictures: PictureSource,
        *,
        num_frames: int,
        strides: Sequence[int],
        frame_step: int = 1,
        augmentation: Augmentation = STRONG,
        reversal: float = 0.5,
    ) -> None:
        if not pictures.videos or not strides or min(strides) < 1:
            raise ValueError(
                f"windows need videos and strides of at least 1, "
                f"got {len(pictures.videos)} videos and strides {list(strides)}"
            )
        self._pictures = pictures
        self._layouts = [WindowLayout(num_frames, max(1, round(stride / frame_step))) for stride in strides]
        self._augmentation = augmentation
        self._reversal = reversal

    def __len__(self) -> int:
        return sum(len(video) for video in self._pictures.videos)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        video = self._pictures.videos[int(rng.integers(len(self._pictures.videos)))]
        layout = self._layouts[int(rng.integers(len(self._layouts)))]
        places = layout.indices(int(rng.integers(len(video))), last=len(video) - 1)
        if rng.random() < self._reversal:
            places = places[::-1]
        pictures = [self._pictures.read(video[place], size) for place in places]
        return self._augmentation.apply(pictures, rng, size)


class StillWindows:
    """Windows in which only the camera moves: one picture, repeated for every frame.

    The mask is the salient object: without motion, it is the foreground.
    """

    def __init__(
        self,
        pictures: PictureSource,
        *,
        num_frames: int,
        augmentation: Augmentation = STRONG,
        camera: Camera = HANDHELD,
    ) -> None:
        self._pictures = pictures
        self._num_frames = num_frames
        self._augmentation = augmentation
        self._camera = camera

    def __len__(self) -> int:
        return len(self._pictures)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        picture = self._pictures.read(index, size)
        return self._augmentation.apply([picture] * self._num_frames, rng, size, camera=self._camera)


class Stills:
    """Single pictures as windows of one frame."""

    def __init__(self, pictures: PictureSource, *, augmentation: Augmentation = Augmentation()) -> None:
        self._pictures = pictures
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self._pictures)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        return self._augmentation.apply([self._pictures.read(index, size)], rng, size)


def _lose_detail(frames: Tensor, factor: float) -> Tensor:
    size = frames.shape[-1]
    smaller = functional.interpolate(frames, [round(size / factor)] * 2, mode="bilinear", antialias=True)
    return functional.interpolate(smaller, [size] * 2, mode="bilinear")


def _occlude(frames: Tensor, masks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Put an ellipse or a bar in front, unless it hides more than half of the foreground of a frame."""
    axis = torch.linspace(-1, 1, frames.shape[-1])
    (x, y), angle = rng.uniform(-0.8, 0.8, size=2), rng.uniform(0, np.pi)
    short, long = rng.uniform(0.04, 0.25), rng.uniform(0.15, 2)
    along = np.cos(angle) * (axis - x) + np.sin(angle) * (axis.unsqueeze(1) - y)
    across = np.cos(angle) * (axis.unsqueeze(1) - y) - np.sin(angle) * (axis - x)
    inside = (along / long) ** 2 + (across / short) ** 2 < 1
    colour = torch.from_numpy(rng.uniform(0, 255, size=(3, 1, 1)).astype(np.float32))
    seen = torch.where(inside, 0.0, masks)
    if (2 * seen.sum(dim=(1, 2)) < masks.sum(dim=(1, 2))).any():
        return frames, masks
    return torch.where(inside, colour, frames), seen
