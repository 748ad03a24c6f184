"""Annotated pictures, small and square: what samples are made of. Read when needed, or kept in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.datasets import Still, VideoSequence, read_mask
from model.errors import DatasetError

MARGIN = 4 / 3  # pixels of a picture per pixel of a sample, so that zooming in finds some


@dataclass(frozen=True)
class Picture:
    """A picture squeezed to a square, as the network's input is."""

    pixels: Tensor  # (4, side, side) uint8: RGB, and how much of the pixel is foreground
    aspect: float  # width by height, before it was squeezed
    soft: bool = False  # whether the annotation is soft, as alpha and masks made by networks are


class PictureSource(Protocol):
    """Annotated pictures by index."""

    videos: Sequence[range]  # which pictures are the frames of a video, in temporal order; one range a video

    def __len__(self) -> int: ...

    def read(self, index: int, size: int) -> Picture:
        """A picture for a sample of ``size`` pixels a side."""
        ...


class Pictures:
    """All annotated pictures of a data set.

    Args:
        entries: Images with their masks.
        videos: Which entries are the frames of a video, in temporal order; one range a video.
    """

    def __init__(self, entries: Sequence[Still], videos: Sequence[range] = ()) -> None:
        self._entries = tuple(entries)
        self._kept: list[Picture] = []
        self._kept_size = 0
        self.videos: Sequence[range] = tuple(videos)

    @classmethod
    def of_stills(cls, stills: Sequence[Still]) -> Self:
        return cls(stills)

    @classmethod
    def of_videos(cls, sequences: Sequence[VideoSequence]) -> Self:
        """The annotated frames; those without a mask are left out, as if the video had fewer frames."""
        entries: list[Still] = []
        videos = []
        for sequence in sequences:
            first = len(entries)
            pairs = zip(sequence.frames, sequence.masks, strict=True)
            entries += [Still(frame, mask) for frame, mask in pairs if mask is not None]
            videos.append(range(first, len(entries)))
        return cls(entries, videos)

    def __len__(self) -> int:
        return len(self._entries)

    def preload(self, size: int) -> None:
        """Read all pictures now, for samples of up to ``size`` pixels a side; forked processes share them.

        A picture takes ``4 * (MARGIN * size)²`` bytes: 2,000 of them 0.23 GB for 128 pixels, 3.3 GB for 480.

        Raises:
            DatasetError: A file cannot be read, or a mask is not of its image's size.
        """
        # One block instead of thousands: nothing in it is touched by reference counts, so it stays shared.
        side = _side(size)
        block = torch.empty((len(self), 4, side, side), dtype=torch.uint8)
        kept = []
        for pixels, entry in zip(block, self._entries, strict=True):
            picture = _read(entry, side)
            pixels.copy_(picture.pixels)
            kept.append(Picture(pixels, picture.aspect))
        self._kept, self._kept_size = kept, size

    def read(self, index: int, size: int) -> Picture:
        """A picture for a sample of ``size`` pixels a side: ``MARGIN`` times that, or what was preloaded.

        Raises:
            ValueError: The pictures were preloaded for smaller samples.
            DatasetError: A file cannot be read, or the mask is not of the image's size.
        """
        if not self._kept:
            return _read(self._entries[index], _side(size))
        if size > self._kept_size:
            raise ValueError(
                f"the pictures were preloaded for samples of up to {self._kept_size}, not {size} pixels"
            )
        return self._kept[index]


def _side(size: int) -> int:
    return round(MARGIN * size)


def _read(entry: Still, side: int) -> Picture:
    foreground = read_mask(entry.mask)
    try:
        with Image.open(entry.image) as image:
            width, height = image.size
            image.draft("RGB", (side, side))  # a JPEG is decoded at the smallest size that holds the square
            squeezed = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    except OSError as error:
        raise DatasetError(f"cannot read the image {entry.image}: {error}") from error
    _require_size(entry.mask, foreground.shape, (height, width))
    coverage = Image.fromarray(foreground.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    stacked = np.dstack([np.asarray(squeezed), np.asarray(coverage)])
    return Picture(torch.from_numpy(stacked).permute(2, 0, 1).contiguous(), width / height)


def _require_size(mask: Path, size: tuple[int, ...], expected: tuple[int, int]) -> None:
    if size != expected:
        raise DatasetError(
            f"{mask} must be of its image's size, {expected[1]}x{expected[0]}, is {size[1]}x{size[0]}"
        )
