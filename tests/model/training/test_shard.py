from pathlib import Path

import numpy as np
import pytest

from model.errors import DatasetError
from model.held_out import HELD_OUT_SEQUENCES, held_out_stills
from model.training.packed import PackedData
from model.training.shard import Shard, write_shard
from model.training.sources import held_out_windows, packed_sources
from model.training.stored_pictures import PARTS, Part
from tests.training_data import write_packed

PLENTY = 1 << 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    root = tmp_path_factory.mktemp("packed")
    write_packed(root, frames=8)
    return PackedData(root, tmp_path_factory.mktemp("cache"), side=64)


@pytest.fixture(scope="module")
def shard(data: PackedData, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    path = tmp_path_factory.mktemp("shard") / "data.zip"
    write_shard(data, path, PLENTY, side=48)
    return Shard(path)


@pytest.mark.parametrize("part", PARTS)
def test_a_shard_with_room_holds_everything(part: Part, data: PackedData, shard: Shard) -> None:
    original, stored = data.part(part), shard.part(part)
    held_out = held_out_stills() & set(original.names)
    assert set(stored.names) == set(original.names) - held_out
    assert (stored.video_names, stored.videos) == (original.video_names, original.videos)
    assert stored.frame_step == 1


@pytest.mark.parametrize("part", PARTS)
def test_pictures_stay_what_they_are(part: Part, data: PackedData, shard: Shard) -> None:
    stored, original = shard.part(part), data.part(part)
    places = {name: place for place, name in enumerate(original.names)}
    for index, name in list(enumerate(stored.names))[:6]:
        picture, expected = stored.read(index, 48), original.read(places[name], 64)
        assert (picture.aspect, picture.soft) == (expected.aspect, expected.soft)
        for layer in (slice(0, 3), slice(3, 4)):
            opaque = (picture.pixels[3:] > 250) if part == "cutouts" else picture.pixels[3:] >= 0
            mean = float((picture.pixels[layer].float() * opaque).mean())
            grown = np.kron(expected.pixels.numpy(), np.ones((1, 3, 3)))  # 192 = 4 * 48
            shrunk = grown.reshape(4, 48, 4, 48, 4).mean(axis=(2, 4))[layer]
            assert mean == pytest.approx(float((shrunk * opaque.numpy()).mean()), abs=4)


def test_soft_masks_stay_soft_and_hard_ones_hard(shard: Shard) -> None:
    teacher, hand = shard.stills(["teacher"]), shard.stills(["duts"])
    assert 204 in teacher.read(0, 48).pixels[3].unique()
    assert set(hand.read(0, 48).pixels[3].unique().tolist()) == {0, 255}


@pytest.mark.parametrize("max_bytes", [50_000, 70_000])
def test_a_shard_is_no_larger_than_allowed(max_bytes: int, data: PackedData, tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    write_shard(data, path, max_bytes, side=64)
    assert max_bytes * 0.6 < path.stat().st_size <= max_bytes
    shard = Shard(path)
    assert shard.part("davis16").frame_step > 1
    assert set(HELD_OUT_SEQUENCES[:4]) < set(shard.part("davis16").video_names)
    assert min(map(len, (shard.part(part) for part in PARTS))) >= 1


def test_too_few_bytes_are_refused(data: PackedData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes of the shard are too few for"):
        write_shard(data, tmp_path / "data.zip", 10_000, side=48)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_trains_and_validates(shard: Shard) -> None:
    sources = packed_sources(shard, num_frames=3, strides=(2, 4))
    assert all(len(source) for source in sources.values())
    for name in ("davis16", "composites"):
        sample = sources[name].sample(0, np.random.default_rng(0), 48)
        assert sample.frames.shape == (3, 3, 48, 48)
    assert set(held_out_windows(shard, 3, 4).names) == set(HELD_OUT_SEQUENCES)


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_what_is_no_shard_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(DatasetError, match=r"data\.zip is not a readable shard"):
        Shard(tmp_path / "data.zip")
