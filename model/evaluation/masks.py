"""What the measures compare: the masks of a prediction and of the truth."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets import VideoSequence, read_mask
from model.errors import DatasetError, ResultsError

Mask = NDArray[np.bool_]


def check_comparable(prediction: Mask, truth: Mask) -> None:
    """Raises: ValueError: The masks differ in shape or are not boolean."""
    if prediction.shape != truth.shape or prediction.dtype != np.bool_ or truth.dtype != np.bool_:
        raise ValueError(
            f"masks must be bool of one shape, "
            f"got {prediction.dtype} {prediction.shape} and {truth.dtype} {truth.shape}"
        )


def read_truth(sequence: VideoSequence, index: int) -> Mask:
    """Read the annotation of a frame, ``(H, W)``.

    Raises:
        DatasetError: There is none, or it cannot be read.
    """
    path = sequence.masks[index]
    if path is None:
        raise DatasetError(f"{sequence.frames[index]} is not annotated")
    return read_mask(path)


def read_prediction(path: Path) -> Mask:
    """Read a file of a mask, ``(H, W)``.

    Foreground are the set pixels of a 1-bit file, every index but 0 of a palette file, and of a grey file
    the pixels of at least 128 or, if none is above 1, those of 1.

    Raises:
        ResultsError: The file is not a readable image, or one of another kind.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ResultsError(f"{path} is not a readable image") from error
    if mode not in ("1", "P", "L"):
        raise ResultsError(f"{path} must be a 1-bit, palette or 8-bit grey image, is of Pillow's mode {mode}")
    mask: Mask = values >= 128 if mode == "L" and values.max() > 1 else values > 0
    return mask
