import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

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


@pytest.mark.data
@pytest.mark.parametrize(
    ("sequence", "shifted", "boxed"),
    [("blackswan", 0.89834, 0.22867), ("bmx-trees", 0.52026, 0.07353), ("dog", 0.89644, 0.32140)],
)
def test_it_agrees_with_the_public_davis_evaluation(
    data_dir: Path, sequence: str, shifted: float, boxed: float
) -> None:
    truths = read_masks(data_dir / "davis16" / "val" / f"{sequence}.masks.zip")[1:-1]
    height, width = truths[0].shape
    box = np.zeros((height, width), np.bool_)
    box[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    assert np.mean([region_similarity(shift(truth), truth) for truth in truths]) == pytest.approx(
        shifted, abs=1e-5
    )
    assert np.mean([region_similarity(box, truth) for truth in truths]) == pytest.approx(boxed, abs=1e-5)


def read_masks(archive: Path) -> list[NDArray[np.bool_]]:
    with zipfile.ZipFile(archive) as file:
        return [
            np.asarray(Image.open(io.BytesIO(file.read(name))).convert("L")) > 0
            for name in sorted(file.namelist())
        ]


def shift(truth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Moved 5 pixels to the right; nothing comes in at the left."""
    shifted = np.zeros_like(truth)
    shifted[:, 5:] = truth[:, :-5]
    return shifted
