import io
import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.errors import DatasetError
from model.held_out import HELD_OUT_SEQUENCES, held_out_stills
from model.training.packed import PackedData
from model.training.picture_cache import Entry, PictureCache
from model.training.stored_pictures import PARTS, Part, StoredPictures
from tests.training_data import write_packed, write_packed_sequence

SIDE = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    write_packed(root)
    return root


@pytest.fixture(scope="module")
def cache(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of all parts."""
    cache = tmp_path_factory.mktemp("cache")
    data = PackedData(root, cache, side=SIDE)
    for part in PARTS:
        data.part(part)
    return cache


def all_pixels(pictures: StoredPictures) -> np.ndarray:
    return np.stack([pictures.read(index, SIDE).pixels.numpy() for index in range(len(pictures))])


def stored_mask(archive: Path, frame: int) -> np.ndarray:
    with zipfile.ZipFile(archive) as masks:
        return np.asarray(Image.open(io.BytesIO(masks.read(f"{frame:05d}.png"))))


def test_videos_have_a_mask_for_every_frame(root: Path, cache: Path) -> None:
    davis = PackedData(root, cache, side=SIDE).part("davis16")
    assert davis.video_names == tuple(sorted(("bear", "bus", *HELD_OUT_SEQUENCES[:4])))
    assert [len(video) for video in davis.videos] == [5] * 6
    assert davis.names[:2] == ("bear/00000", "bear/00001")
    picture = davis.read(0, SIDE)
    assert picture.pixels.shape == (4, SIDE, SIDE)
    assert picture.aspect == pytest.approx(80 / 48)
    assert not picture.soft
    mask = stored_mask(root / "davis16" / "train" / "bear.masks.zip", 0)
    assert picture.pixels[3].float().mean() / 255 == pytest.approx(mask.mean(), abs=0.002)


def test_masks_of_networks_and_alpha_are_soft(root: Path, cache: Path) -> None:
    data = PackedData(root, cache, side=SIDE)
    teacher, hand = data.stills(["teacher"]), data.stills(["duts", "ccp"])
    assert [teacher.read(index, SIDE).soft for index in range(2)] == [True, True]
    assert int(teacher.read(0, SIDE).pixels[3].max()) == 204
    assert not any(hand.read(index, SIDE).soft for index in range(len(hand)))
    assert data.cutouts().read(0, SIDE).soft


def test_cutouts_keep_their_pixels(root: Path, cache: Path) -> None:
    cutout = PackedData(root, cache, side=SIDE).cutouts().read(0, SIDE)
    original = np.asarray(Image.open(root / "cutouts" / "cats_00001.webp"))
    height, width = original.shape[:2]
    assert cutout.aspect == 1
    assert np.array_equal(cutout.pixels[3, :height, :width], original[..., 3])
    assert int(cutout.pixels[3, height:].max()) == int(cutout.pixels[3, :, width:].max()) == 0


def test_scenes_have_no_foreground(root: Path, cache: Path) -> None:
    assert not all_pixels(PackedData(root, cache, side=SIDE).scenes())[:, 3].any()


def test_what_is_held_out_comes_only_when_asked_for(root: Path, cache: Path) -> None:
    data = PackedData(root, cache, side=SIDE)
    assert set(data.sequences("davis16").video_names) == {"bear", "bus"}
    assert set(data.sequences("further").video_names) == {"clip-fox", "sbi-cars"}
    assert not held_out_stills() & set(data.stills().names)
    assert len(data.stills()) == len(data.part("stills")) - 2
    asked = data.sequences("davis16", names=["car-turn"], exclude=())
    assert (asked.video_names, asked.names[0], len(asked)) == (("car-turn",), "car-turn/00000", 5)


def test_names_and_prefixes_that_are_not_there_are_errors(root: Path, cache: Path) -> None:
    data = PackedData(root, cache, side=SIDE)
    with pytest.raises(DatasetError, match="no sequence giraffe"):
        data.sequences("davis16", names=["giraffe"])
    with pytest.raises(DatasetError, match="prefix giraffes"):
        data.stills(["duts", "giraffes"])


@pytest.mark.parametrize("part", PARTS)
def test_the_cache_alone_will_do(part: Part, root: Path, cache: Path, tmp_path: Path) -> None:
    alone = PackedData(tmp_path / "missing", cache, side=SIDE).part(part)
    packed = PackedData(root, cache, side=SIDE).part(part)
    assert alone.names == packed.names
    assert np.array_equal(all_pixels(alone), all_pixels(packed))


def test_without_data_and_cache_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"scenes: no .*scenes/\*\.webp.*no intact cache of 64 pixels"):
        PackedData(tmp_path / "data", tmp_path / "cache", side=SIDE).scenes()


def _truncate(pixels: Path, index: Path) -> None:
    pixels.write_bytes(pixels.read_bytes()[:-1])


def _overwrite(pixels: Path, index: Path) -> None:
    pixels.write_bytes(bytes(pixels.stat().st_size))


def _unfinish(pixels: Path, index: Path) -> None:
    index.unlink()


def _garble(pixels: Path, index: Path) -> None:
    index.write_text('{"side": 64}')


def _lose_checksums(pixels: Path, index: Path) -> None:
    state = json.loads(index.read_text())
    index.write_text(json.dumps({**state, "checksums": []}))


@pytest.mark.parametrize("damage", [_truncate, _overwrite, _unfinish, _garble, _lose_checksums])
def test_a_damaged_cache_is_built_anew(
    damage: Callable[[Path, Path], None], root: Path, cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    damage(copy / "scenes-64.pixels", copy / "scenes-64.json")
    with pytest.raises(DatasetError, match="no intact cache"):
        PackedData(tmp_path / "missing", copy, side=SIDE).scenes()
    sound, again = (PackedData(root, folder, side=SIDE).scenes() for folder in (cache, copy))
    assert np.array_equal(all_pixels(sound), all_pixels(again))


def test_a_changed_original_is_read_again(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "scenes", tmp_path / "data" / "scenes")
    before = PackedData(tmp_path / "data", tmp_path / "cache", side=SIDE).scenes()
    Image.new("RGB", (30, 30), (7, 7, 7)).save(
        tmp_path / "data" / "scenes" / "cats_00001.webp", lossless=True
    )
    after = PackedData(tmp_path / "data", tmp_path / "cache", side=SIDE).scenes()
    assert int(after.read(0, SIDE).pixels[:3].max()) == 7
    assert int(before.read(0, SIDE).pixels[:3].max()) > 7  # a run that goes on keeps what it has opened


def test_who_comes_second_waits_for_the_first(tmp_path: Path) -> None:
    both = threading.Barrier(2)
    built = []

    def entries() -> Iterator[Entry]:
        built.append(threading.get_ident())
        yield Entry("grey", np.full((4, 8, 8), 99, np.uint8), aspect=1.5, soft=False)

    def use(_: int) -> int:
        both.wait()
        pictures = PictureCache(tmp_path, "some", 8).open_or_build("this", entries)
        return int(pictures.read(0, 8).pixels.max())

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(use, range(2))) == [99, 99]
    assert len(built) == 1


def test_a_failure_leaves_no_cache(tmp_path: Path) -> None:
    def entries() -> Iterator[Entry]:
        yield Entry("grey", np.full((4, 8, 8), 99, np.uint8), aspect=1, soft=False)
        raise DatasetError("the second is broken")

    cache = PictureCache(tmp_path, "some", 8)
    with pytest.raises(DatasetError, match="the second is broken"):
        cache.open_or_build("this", entries)
    assert cache.open() is None


@pytest.mark.parametrize(("frames", "masks"), [(4, 3), (3, 4)])
def test_frames_and_masks_must_be_as_many(frames: int, masks: int, tmp_path: Path) -> None:
    (tmp_path / "sequences").mkdir()
    images = [np.full((16, 16, 3), 90, np.uint8)] * frames
    write_packed_sequence(tmp_path / "sequences", "odd", images, [np.ones((16, 16), np.bool_)] * masks)
    expected = "3 masks, but odd.mp4 has more frames" if masks < frames else "more masks than the 3 frames"
    with pytest.raises(DatasetError, match=rf"odd\.masks\.zip has {expected}"):
        PackedData(tmp_path, tmp_path / "cache", side=SIDE).part("further")


def test_an_incomplete_pack_is_an_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "stills").mkdir()
    shutil.copy(root / "stills" / "stills.tar", tmp_path / "stills")
    with pytest.raises(DatasetError, match=r"stills is incomplete: no .*stills-2\.zip"):
        PackedData(tmp_path, tmp_path / "cache", side=SIDE).stills()


def test_a_broken_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "sequences").mkdir()
    (tmp_path / "sequences" / "odd.mp4").write_bytes(b"no video")
    with zipfile.ZipFile(tmp_path / "sequences" / "odd.masks.zip", "w"):
        pass
    with pytest.raises(DatasetError, match=r"cannot read the video .*odd\.mp4"):
        PackedData(tmp_path, tmp_path / "cache", side=SIDE).part("further")


def test_samples_may_not_be_larger_than_the_pictures(root: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="64 pixels a side, too few for samples of 65"):
        PackedData(root, cache, side=SIDE).scenes().read(0, 65)


@pytest.mark.data
def test_the_development_data_are_read(data_dir: Path, tmp_path: Path) -> None:
    for folder, name in (("davis16/train", "drift-turn"), ("sequences", "clip-lady-running")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for suffix in (".mp4", ".masks.zip"):
            (tmp_path / "data" / folder / f"{name}{suffix}").symlink_to(data_dir / folder / f"{name}{suffix}")
    data = PackedData(tmp_path / "data", tmp_path / "cache", side=96)
    davis, further = data.part("davis16"), data.part("further")
    assert (davis.video_names, len(davis)) == (("drift-turn",), 64)
    assert davis.read(0, 96).aspect == pytest.approx(854 / 480)
    assert further.video_names == ("clip-lady-running",)
    for folder, pictures in (("davis16/train", davis), ("sequences", further)):
        frame = len(pictures) // 2
        assert pictures.read(frame, 96).pixels[3].float().mean() / 255 == pytest.approx(
            stored_mask(data_dir / folder / f"{pictures.video_names[0]}.masks.zip", frame).mean(), abs=0.002
        )
