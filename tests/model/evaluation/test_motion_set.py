"""The clips as they are rendered from the development data, and the source that renders them."""

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from numpy.typing import NDArray

from model.datasets import VideoSequence, davis16, read_frame, read_mask
from model.errors import DatasetError
from model.evaluation.motion_clips import FRAMES, HEIGHT, KINDS, WIDTH, MotionClips, clip_names, kind_of
from model.evaluation.motion_set import BACKGROUND_SEQUENCES, MotionSet
from model.evaluation.packed import unpack_sequences, unpack_stills
from model.held_out import HELD_OUT_SEQUENCES, held_out_stills
from tests.packed_data import pack_motion_data

# Of each clip: share of its pixels that the mover fills, and mean colour.
DIGESTS = {
    "crowd-1": (0.053, (99, 106, 64)),
    "crowd-2": (0.020, (181, 158, 129)),
    "crowd-3": (0.058, (92, 88, 86)),
    "crowd-4": (0.064, (104, 104, 96)),
    "crowd-5": (0.079, (123, 113, 91)),
    "plain-1": (0.056, (148, 138, 108)),
    "plain-2": (0.050, (117, 118, 98)),
    "plain-3": (0.022, (97, 93, 90)),
    "plain-4": (0.042, (98, 95, 94)),
    "plain-5": (0.058, (101, 90, 87)),
    "following-1": (0.044, (156, 145, 117)),
    "following-2": (0.051, (129, 125, 102)),
    "following-3": (0.062, (144, 137, 130)),
    "following-4": (0.067, (158, 142, 127)),
    "following-5": (0.113, (103, 97, 95)),
}


def shares(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of each scored frame, the share of its pixels that is set."""
    return masks[1:-1].mean(axis=(1, 2))


@pytest.fixture(scope="module")
def clips(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> MotionClips:
    out = tmp_path_factory.mktemp("held-out")
    videos = [data_dir / "davis16" / "train" / f"{name}.mp4" for name in BACKGROUND_SEQUENCES]
    return MotionClips(unpack_stills(data_dir, held_out_stills(), out), unpack_sequences(videos, out))


@pytest.mark.data
@pytest.mark.parametrize("name", clip_names())
def test_a_clip_is_the_same_as_ever_and_keeps_the_conditions(clips: MotionClips, name: str) -> None:
    clip = clips.render(name)
    share, colour = DIGESTS[name]
    assert clip.masks.mean() == pytest.approx(share, abs=1e-3)
    assert clip.frames.mean(axis=(0, 1, 2)) == pytest.approx(colour, abs=1)

    mover, resting = shares(clip.masks), shares(clip.resting)
    assert mover.min() >= 0.015
    assert mover.max() <= 0.35
    assert resting.min() >= 0.5 * mover.mean()  # by its size, the mover does not stand out
    assert not (clip.masks & clip.resting).any()


def test_there_are_five_clips_of_each_kind() -> None:
    assert {kind: sum(kind_of(name) == kind for name in clip_names()) for kind in KINDS} == {
        "crowd": 5,
        "plain": 5,
        "following": 5,
    }


def test_backgrounds_and_cut_outs_are_held_out() -> None:
    assert set(BACKGROUND_SEQUENCES) <= set(HELD_OUT_SEQUENCES)
    assert len(held_out_stills()) == 120


@pytest.fixture(scope="module")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in the place of the development data."""
    root = tmp_path_factory.mktemp("data")
    pack_motion_data(root, names=[*BACKGROUND_SEQUENCES, "bear"], stills=[*held_out_stills(), "pets_other"])
    return root


@pytest.fixture(scope="module")
def rendered(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[VideoSequence]]:
    folder = tmp_path_factory.mktemp("clips")
    return folder, MotionSet(made_data).load(["crowd-2", "following-1"], folder)


def test_clips_are_written_in_the_layout_of_davis(rendered: tuple[Path, list[VideoSequence]]) -> None:
    folder, sequences = rendered
    assert [(one.name, one.category) for one in sequences] == [
        ("crowd-2", "crowd"),
        ("following-1", "following"),
    ]
    read = davis16(folder, "val")
    assert [(one.name, one.frames, one.masks) for one in read] == [
        (one.name, one.frames, one.masks) for one in sequences
    ]
    assert len(read[0].frames) == FRAMES
    assert read_frame(read[0].frames[0]).shape == (HEIGHT, WIDTH, 3)


def test_what_is_not_foreground_rests_unless_the_camera_moves(
    rendered: tuple[Path, list[VideoSequence]],
) -> None:
    """Between neighbouring frames of a crowd before a camera that rests, little changes but the mover."""
    sequence = rendered[1][0]
    frames = [read_frame(path).astype(float).mean(axis=2) for path in sequence.frames]
    masks = [read_mask(path) for path in sequence.masks if path is not None]
    inside, outside = [], []
    for before, after in zip(range(FRAMES - 1), range(1, FRAMES), strict=True):
        change, mover = np.abs(frames[after] - frames[before]), masks[before] | masks[after]
        inside.append(change[mover].mean())
        outside.append(change[~mover].mean())
    assert fmean(inside) > 2 * fmean(outside)


def test_a_clip_is_rendered_alike_alone_and_with_others(
    made_data: Path, rendered: tuple[Path, list[VideoSequence]], tmp_path: Path
) -> None:
    (alone,) = MotionSet(made_data).load(["following-1"], tmp_path)
    for path, other in zip(alone.frames, rendered[1][1].frames, strict=True):
        assert np.array_equal(read_frame(path), read_frame(other))


def test_data_that_is_incomplete_is_refused(tmp_path: Path) -> None:
    pack_motion_data(tmp_path / "few", names=BACKGROUND_SEQUENCES, stills=["pets_1"])
    with pytest.raises(DatasetError, match=r"stills\.tar lacks Image/"):
        MotionSet(tmp_path / "few").load(["crowd-1"], tmp_path / "out")
    pack_motion_data(tmp_path / "short", names=["car-turn", "bear"], stills=held_out_stills())
    with pytest.raises(DatasetError, match="lacks the held-out sequence bmx-bumps"):
        MotionSet(tmp_path / "short").load(["crowd-1"], tmp_path / "out")


@pytest.mark.parametrize("name", ["crowd-0", "crowd-6", "crowd", "walk-1"])
def test_another_clip_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no clip is called {name}; there are crowd-1"):
        kind_of(name)
