"""In which order training sees its samples. Every batch follows from its step alone. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["video", "image"]


@dataclass(frozen=True)
class SampleKey:
    """Which sample, and the seed of what is random about it, for ``numpy.random.default_rng``."""

    index: int
    seed: tuple[int, int, int]  # of the run; the step; the position in the batch


@dataclass(frozen=True)
class Batch:
    kind: Kind
    keys: tuple[SampleKey, ...]


def joint_image_batches(videos: int, images: int, batch_size: int) -> int:
    """How many image batches follow a video batch, so that all images are seen while all videos are.

    The paper's Eq. 14, read literally, is 0 for its own 2,079 frames, 10,553 photos and batches of 8.
    The authors' code computes ``images // (videos // batch_size * batch_size)``, which is 5.
    Videos that do not fill a batch count as one.
    """
    return images // (max(1, videos // batch_size) * batch_size)


class JointSampler:
    """Video batches with image batches after each; no batch holds both kinds.

    Of each kind, every index comes once an epoch, in an order of that epoch's own. Epochs follow each other
    without a seam: a batch may hold the last of one and the first of the next.

    Args:
        videos: Number of video samples; 0 for image batches only.
        images: Number of image samples; 0 for video batches only.
        image_batches: Image batches after each video batch; None for ``joint_image_batches``.

    Raises:
        ValueError: A number is out of range, there is nothing to sample, or no image would ever come.
    """

    def __init__(
        self, *, videos: int, images: int, batch_size: int, image_batches: int | None = None, seed: int = 0
    ) -> None:
        if min(videos, images, seed) < 0 or batch_size < 1:
            raise ValueError(
                f"videos, images and seed must be at least 0 and batch_size at least 1, "
                f"got {videos}, {images}, {seed} and {batch_size}"
            )
        if videos == images == 0:
            raise ValueError("there must be videos or images to sample")
        if image_batches is None:
            image_batches = joint_image_batches(videos, images, batch_size)
        if videos and images and image_batches < 1:
            raise ValueError(
                f"{videos} videos, {images} images and {image_batches} image batches after each video batch: "
                f"no image would ever come; give image_batches, at least 1"
            )
        self._counts: dict[Kind, int] = {"video": videos, "image": images}
        self._batch_size = batch_size
        self._image_batches = image_batches
        self._seed = seed
        self._orders: dict[Kind, tuple[int, NDArray[np.int64]]] = {}  # the epoch last used and its order

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        kind, earlier = self._place(step)
        keys = (
            SampleKey(self._index(kind, earlier * self._batch_size + position), (self._seed, step, position))
            for position in range(self._batch_size)
        )
        return Batch(kind, tuple(keys))

    def _place(self, step: int) -> tuple[Kind, int]:
        """The kind of a step's batch, and how many of that kind come before it."""
        if not self._counts["image"]:
            return "video", step
        if not self._counts["video"]:
            return "image", step
        cycle, place = divmod(step, 1 + self._image_batches)
        return ("video", cycle) if place == 0 else ("image", cycle * self._image_batches + place - 1)

    def _index(self, kind: Kind, position: int) -> int:
        """The index at a position in the endless row of a kind's epochs."""
        epoch, place = divmod(position, self._counts[kind])
        if kind not in self._orders or self._orders[kind][0] != epoch:
            rng = np.random.default_rng((self._seed, epoch, ord(kind[0])))
            self._orders[kind] = epoch, rng.permutation(self._counts[kind])
        return int(self._orders[kind][1][place])
