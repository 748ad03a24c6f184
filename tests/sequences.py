"""Small annotated sequences on disk, laid out as DAVIS is, and predictions for them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets import VideoSequence

Mask = NDArray[np.bool_]

HEIGHT, WIDTH = 40, 56


class GivenMasks:
    """Predictions that are arrays, one a frame; knows which frames were asked for."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._masks = masks
        self.asked_for: list[int] = []

    def masks(self, sequence: VideoSequence, indices: Sequence[int]) -> Iterator[Mask]:
        for index in indices:
            self.asked_for.append(index)
            yield self._masks[index]


def square(left: int) -> Mask:
    """10 x 10 pixels, ``left`` of them from the left edge."""
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[10:20, left : left + 10] = True
    return mask


def write_sequence(
    root: Path, masks: Iterable[Mask | None], *, name: str = "clip", category: str | None = None
) -> VideoSequence:
    """Write frames of noise with these annotations; a None is a frame without one."""
    random = np.random.default_rng(0)
    frames, annotations = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    frames.mkdir(parents=True)
    annotations.mkdir(parents=True)
    pairs: list[tuple[Path, Path | None]] = []
    for index, mask in enumerate(masks):
        frame = frames / f"{index:05d}.jpg"
        Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(frame)
        pairs.append((frame, None if mask is None else annotations / f"{index:05d}.png"))
        if mask is not None:
            Image.fromarray(mask).save(annotations / f"{index:05d}.png")
    return VideoSequence(name, *zip(*pairs, strict=True), category=category)
