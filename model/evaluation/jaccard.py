"""J, the region similarity of the DAVIS benchmarks."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def region_similarity(prediction: Mask, truth: Mask) -> float:
    """J = |P ∩ G| / |P ∪ G| of two masks ``(H, W)``; 1 if both are empty.

    Raises:
        ValueError: The masks differ in shape or are not boolean.
    """
    if prediction.shape != truth.shape or prediction.dtype != np.bool_ or truth.dtype != np.bool_:
        raise ValueError(
            f"masks must be bool of one shape, "
            f"got {prediction.dtype} {prediction.shape} and {truth.dtype} {truth.shape}"
        )
    union = int(np.count_nonzero(prediction | truth))
    return int(np.count_nonzero(prediction & truth)) / union if union else 1.0
