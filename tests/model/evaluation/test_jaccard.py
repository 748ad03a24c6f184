import numpy as np
import pytest
from numpy.typing import NDArray

from model.evaluation.jaccard import region_similarity


def mask(*rows: str) -> NDArray[np.bool_]:
    return np.array([[cell == "#" for cell in row] for row in rows])


def test_it_is_the_intersection_over_the_union() -> None:
    assert region_similarity(mask("##..", "##.."), mask(".##.", ".##.")) == pytest.approx(2 / 6)


def test_equal_masks_have_1_and_disjoint_ones_0() -> None:
    assert region_similarity(mask("##.."), mask("##..")) == 1
    assert region_similarity(mask("##.."), mask("..##")) == 0


def test_two_empty_masks_agree() -> None:
    assert region_similarity(mask("...."), mask("....")) == 1


def test_one_empty_mask_does_not_agree_with_one_that_is_not() -> None:
    assert region_similarity(mask("...."), mask("#...")) == 0


def test_masks_of_another_shape_or_type_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        region_similarity(mask("#."), mask("#.."))
    with pytest.raises(ValueError, match="uint8"):
        region_similarity(mask("#.").astype(np.uint8), mask("#."))  # type: ignore[arg-type]
