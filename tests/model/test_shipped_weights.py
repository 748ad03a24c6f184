"""The weights that ship: small, honest about themselves, and better than a guess."""

import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from model.evaluation.jaccard import region_similarity
from model.segmenter import Segmenter
from model.shipped import SHIPPED_WEIGHTS
from model.weights import read_info


def test_the_file_is_within_its_budget() -> None:
    assert SHIPPED_WEIGHTS.stat().st_size <= 32 * 10**6


def test_it_says_that_it_is_trained_on_what_and_under_which_terms() -> None:
    info = read_info(SHIPPED_WEIGHTS)
    assert info.trained
    assert info.config.backbone == "efficientnet_lite0"
    assert "DAVIS" in info.provenance
    assert info.licence == "CC-BY-NC-4.0"


@pytest.mark.data
def test_its_masks_are_better_than_a_constant_box(data_dir: Path) -> None:
    segmenter = Segmenter.load(device="cpu")
    margin = segmenter.layout.margin
    found, guessed = [], []
    for video in sorted((data_dir / "davis16" / "val").glob("*.mp4")):
        with zipfile.ZipFile(video.with_suffix(".masks.zip")) as archive:
            names = sorted(archive.namelist())
            middle = len(names) // 2
            with archive.open(names[middle]) as png, Image.open(png) as image:
                truth = np.asarray(image.convert("L")) > 0
        with av.open(video) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        window = frames[middle - margin : middle + margin + 1]
        (mask,) = segmenter.segment(window, start=margin, stop=margin + 1)
        found.append(region_similarity(mask, truth))
        box = np.zeros_like(truth)
        height, width = truth.shape
        box[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
        guessed.append(region_similarity(box, truth))
    assert len(found) == 10
    assert np.mean(found) > np.mean(guessed) + 0.3
