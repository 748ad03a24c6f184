"""J, the region similarity of the DAVIS benchmarks."""

import numpy as np

from model.evaluation.masks import Mask, check_comparable


def region_similarity(prediction: Mask, truth: Mask) -> float:
    """J = |P ∩ G| / |P ∪ G| of two masks ``(H, W)``; 1 if both are empty.

    Raises:
        ValueError: The masks differ in shape or are not boolean.
    """
    check_comparable(prediction, truth)
    union = int(np.count_nonzero(prediction | truth))
    return int(np.count_nonzero(prediction & truth)) / union if union else 1.0
