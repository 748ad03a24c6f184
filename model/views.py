"""How often the network looks at a frame, and how: the views whose probabilities make a mask."""

from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from model.imcnet import SIZE_MULTIPLE

Quality = Literal["fast", "exact", "multi_scale"]

_BASE_SIZE = 480
# Sizes, for an input size of 480, and what is mirrored: nothing, top and bottom, left and right.
_SIZES: dict[Quality, tuple[int, ...]] = {
    "fast": (_BASE_SIZE,),
    "exact": (_BASE_SIZE,),
    "multi_scale": (352, _BASE_SIZE, 736),
}
_MIRRORED: dict[Quality, tuple[tuple[int, ...], ...]] = {
    "fast": ((),),
    "exact": ((),),
    "multi_scale": ((), (-2,), (-1,)),
}


@dataclass(frozen=True)
class View:
    """A frame as the network sees it.

    Args:
        size: Height and width that the frame is resized to, a multiple of 32.
        mirrored: Dimensions of ``(..., H, W)`` that are reversed after that.
    """

    size: int
    mirrored: tuple[int, ...]


def views_of(quality: Quality, input_size: int) -> tuple[View, ...]:
    """List the views of a quality.

    ``exact`` is one, the frame as it is; so is ``fast``, which an engine of less precision computes.
    ``multi_scale`` is the protocol of the paper's starred results, as
    the release's ``Solver.multi_scale_test`` has it: three sizes, each as it is, upside down and left to
    right. The sizes are 352, 480 and 736 on DAVIS, and 224, 288 and 448 on YouTube-Objects: both are the
    input size times 352/480, 1 and 736/480, to the nearest multiple of 32. The nine have 11.7 times the
    pixels of the one.

    Args:
        input_size: A positive multiple of 32.

    Raises:
        ValueError: There is no such quality.
    """
    if quality not in get_args(Quality):
        raise ValueError(f"quality must be one of {', '.join(get_args(Quality))}, got {quality!r}")
    return tuple(
        View(SIZE_MULTIPLE * round(input_size * size / (_BASE_SIZE * SIZE_MULTIPLE)), mirrored)
        for size, mirrored in product(_SIZES[quality], _MIRRORED[quality])
    )
