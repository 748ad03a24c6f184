from pathlib import Path

import numpy as np
import pytest

from model.datasets import read_frame, read_mask
from model.errors import DatasetError
from model.evaluation.packed import unpack_sequences, unpack_stills
from model.scenes import render_scene
from tests.packed_data import pack_sequence, pack_stills


def test_a_packed_sequence_has_its_frames_and_masks(tmp_path: Path) -> None:
    video = pack_sequence(tmp_path, "bear", frames=4, seed=3)
    (sequence,) = unpack_sequences([video], tmp_path / "out")
    assert sequence.name == "bear"
    assert [path.relative_to(tmp_path / "out").as_posix() for path in sequence.frames[:2]] == [
        "JPEGImages/480p/bear/00000.jpg",
        "JPEGImages/480p/bear/00001.jpg",
    ]
    scene = render_scene(frames=4, height=48, width=64, seed=3)
    for frame, mask, (image, truth) in zip(sequence.frames, sequence.masks, scene, strict=True):
        assert mask is not None
        assert np.array_equal(read_mask(mask), truth)
        assert np.abs(read_frame(frame).astype(int) - image).mean() < 16  # what the codec leaves


def test_a_sequence_that_lacks_masks_is_refused(tmp_path: Path) -> None:
    video = pack_sequence(tmp_path, "bear", frames=4, masks=3)
    with pytest.raises(DatasetError, match=r"bear\.mp4 has 4 frames but 3 masks"):
        unpack_sequences([video], tmp_path / "out")


@pytest.mark.parametrize(("suffix", "what"), [(".mp4", "the video"), (".masks.zip", "the masks in")])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, what: str) -> None:
    video = pack_sequence(tmp_path, "bear")
    (tmp_path / f"bear{suffix}").write_bytes(b"nothing of the kind")
    with pytest.raises(DatasetError, match=rf"cannot read {what} .*bear{suffix}"):
        unpack_sequences([video], tmp_path / "out")


def test_only_the_stills_asked_for_are_unpacked(tmp_path: Path) -> None:
    pack_stills(tmp_path, ["pets_2", "pets_1", "human_7"])
    stills = unpack_stills(tmp_path, {"pets_1", "human_7"}, tmp_path / "out")
    assert [(still.image.name, still.mask.name) for still in stills] == [
        ("human_7.jpg", "human_7.png"),
        ("pets_1.jpg", "pets_1.png"),
    ]
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 4


def test_a_still_that_is_missing_is_named(tmp_path: Path) -> None:
    pack_stills(tmp_path, ["pets_1"])
    with pytest.raises(DatasetError, match=r"stills\.tar lacks Image/pets_2\.jpg"):
        unpack_stills(tmp_path, {"pets_1", "pets_2"}, tmp_path / "out")
