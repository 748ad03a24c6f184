"""How far the masks of two engines agree, measured on scenes made up for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from model.engine import Engine
from model.errors import EngineUnavailable
from model.scenes import render_scene
from model.segmenter import Segmenter
from model.views import Quality

_SCENES = 3
_FRAMES = 4  # at least; of a stride of 4, windows repeat the first and the last
_OBJECTS = 4  # a network that misses some still has something to show
_HEIGHT, _WIDTH = 240, 432
_MIN_FOREGROUND = 1e-3


@dataclass(frozen=True)
class Agreement:
    """How two sequences of masks compare.

    Attributes:
        flipped: Share of the pixels that differ.
        iou: Intersection over union of the foreground of all frames; 1 where there is none.
        foreground: Share of the pixels that are foreground in either.
    """

    flipped: float
    iou: float
    foreground: float

    @classmethod
    def of(cls, masks: Sequence[NDArray[np.bool_]], others: Sequence[NDArray[np.bool_]]) -> Self:
        """Compare masks, ``(H, W)`` bool, one by one."""
        ours, theirs = np.stack(masks), np.stack(others)
        union = int(np.count_nonzero(ours | theirs))
        return cls(
            flipped=int(np.count_nonzero(ours != theirs)) / ours.size,
            iou=int(np.count_nonzero(ours & theirs)) / union if union else 1.0,
            foreground=union / ours.size,
        )

    @property
    def tells_something(self) -> bool:
        """Whether there is both foreground and background: masks of one value agree whatever they show."""
        return _MIN_FOREGROUND <= self.foreground <= 1 - _MIN_FOREGROUND


@dataclass(frozen=True)
class Gate:
    """What an engine's masks must hold to, beside those of the network itself.

    Attributes:
        max_flipped: Largest share of pixels that may differ.
        min_iou: Lowest intersection over union of the foreground.
    """

    max_flipped: float = 1.0
    min_iou: float = 0.0

    def allows(self, agreement: Agreement) -> bool:
        """Whether the masks hold to it, and there was something to compare."""
        return (
            agreement.tells_something
            and agreement.flipped <= self.max_flipped
            and agreement.iou >= self.min_iou
        )

    def check(self, agreement: Agreement) -> None:
        """Raises: EngineUnavailable: The masks differ too much, or there was nothing to compare."""
        if not agreement.tells_something:
            raise EngineUnavailable(
                "with these weights its masks cannot be told right from wrong: foreground is nothing or all"
            )
        if not self.allows(agreement):
            raise EngineUnavailable(
                f"its masks differ from the network's own: {agreement.flipped:.3%} of the pixels, IoU "
                f"{agreement.iou:.4f}; allowed are {self.max_flipped:.3%} and {self.min_iou:.4f}"
            )


EXACT_GATE = Gate(max_flipped=1e-4)
"""Of an engine in float32, which differs in the order of its sums alone."""

FAST_GATE = Gate(min_iou=0.99)
"""Of an engine in 16 bit. Measured with a small trained network: bfloat16 0.995, INT8 0.973."""


def measure_agreement(segmenter: Segmenter, *engines: Engine) -> list[Agreement]:
    """Compare engines with PyTorch's, on the same scenes each time.

    Args:
        segmenter: As it was made.
        engines: Of the same network, taking images of the segmenter's input size.

    Returns:
        One agreement an engine.
    """
    # What works on batches is to have a full one too: other kernels than for a few frames may compute it.
    batched = [engine.batch + segmenter.layout.margin for engine in engines if engine.batch > 1]
    frames = max([_FRAMES, *batched])
    expected = _segment_scenes(segmenter, "exact", frames)
    agreements = []
    for engine in engines:
        segmenter.engines["fast"] = engine
        agreements.append(Agreement.of(_segment_scenes(segmenter, "fast", frames), expected))
    return agreements


def _segment_scenes(segmenter: Segmenter, quality: Quality, frames: int) -> list[NDArray[np.bool_]]:
    masks: list[NDArray[np.bool_]] = []
    for seed in range(_SCENES):
        scene = render_scene(frames=frames, height=_HEIGHT, width=_WIDTH, objects=_OBJECTS, seed=seed)
        masks += segmenter.segment((image for image, _ in scene), quality=quality)
    return masks
