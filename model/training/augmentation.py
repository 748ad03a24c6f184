"""Windows of real videos and stills, varied anew each time: flipped, turned, zoomed, recoloured."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.training.pictures import Picture, Pictures
from model.training.samples import Sample
from model.windows import WindowLayout


@dataclass(frozen=True)
class Augmentation:
    """How much samples are varied. The paper flips, turns and scales; recolouring helps small data sets.

    Args:
        flip: Probability of mirroring left and right.
        rotation: Probability of turning by up to ``max_degrees`` either way.
        zoom: Smallest and largest magnification; a random part is shown, mirrored at the picture's edges.
        colour: Brightness, contrast and saturation change by up to this share.
    """

    flip: float = 0.5
    rotation: float = 0.2
    max_degrees: float = 15
    zoom: tuple[float, float] = (0.75, 4 / 3)
    colour: float = 0.2

    def apply(self, pictures: list[Picture], rng: np.random.Generator, size: int) -> Sample:
        """One sample of all pictures, varied all alike."""
        stack = torch.stack([picture.pixels for picture in pictures]).float()
        warped = _warp(stack, self._placement(pictures[0].aspect, rng), size)
        return Sample(
            frames=self._recolour(warped[:, :3], rng).add(0.5).clamp(0, 255).to(torch.uint8),
            masks=warped[:, 3] >= 127.5,
        )

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

    def _recolour(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        brightness, contrast, saturation = rng.uniform(1 - self.colour, 1 + self.colour, size=3)
        frames = frames * brightness
        frames = torch.lerp(frames.mean(), frames, contrast)
        return torch.lerp(frames.mean(dim=1, keepdim=True), frames, saturation)


class Windows:
    """Windows around every annotated frame of every video; at its ends, frames repeat as in ``WindowLayout``.

    Training needs the masks of all frames, so windows step over annotated frames: where a data set holds or
    annotates every fifth frame only, ``frame_stride`` counts those.

    Args:
        reversal: Probability of turning a window's time around.
        stride_jitter: The stride varies by up to this much either way, but is at least 1.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        num_frames: int = 3,
        frame_stride: int = 4,
        augmentation: Augmentation = Augmentation(),
        reversal: float = 0.0,
        stride_jitter: int = 0,
    ) -> None:
        self._pictures = pictures
        self._layout = WindowLayout(num_frames, frame_stride)
        self._augmentation = augmentation
        self._reversal = reversal
        self._stride_jitter = stride_jitter
        self._centres = [(video, place) for video in pictures.videos for place in range(len(video))]

    def __len__(self) -> int:
        return len(self._centres)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        """The window around an annotated frame, varied."""
        video, centre = self._centres[index]
        jitter = int(rng.integers(-self._stride_jitter, self._stride_jitter, endpoint=True))
        layout = WindowLayout(self._layout.num_frames, max(1, self._layout.frame_stride + jitter))
        places = layout.indices(centre, last=len(video) - 1)
        if rng.random() < self._reversal:
            places = places[::-1]
        pictures = [self._pictures.read(video[place], size) for place in places]
        return self._augmentation.apply(pictures, rng, size)


class Stills:
    """Single pictures as windows of one frame."""

    def __init__(self, pictures: Pictures, *, augmentation: Augmentation = Augmentation()) -> None:
        self._pictures = pictures
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self._pictures)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        return self._augmentation.apply([self._pictures.read(index, size)], rng, size)


def _warp(stack: Tensor, placement: Tensor, size: int) -> Tensor:
    """Sample pictures, ``(N, C, side, side)``, at an affine grid: ``(N, C, size, size)``."""
    source_pixels = stack.shape[-1] / size * float(placement[:, :2].square().sum(dim=1).sqrt().min())
    if source_pixels >= 2:  # per pixel of the sample: too many for bilinear sampling, which sees two
        stack = functional.avg_pool2d(stack, int(source_pixels))
    channels = stack.flatten(0, 1).unsqueeze(0)  # one picture of many channels, for they share the grid
    grid = functional.affine_grid(placement.unsqueeze(0), [1, 1, size, size], align_corners=False)
    warped = functional.grid_sample(channels, grid, padding_mode="reflection", align_corners=False)
    return warped.view(*stack.shape[:2], size, size)
