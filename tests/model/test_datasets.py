from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.datasets import davis16, duts, read_frame, read_mask, youtube_objects, youtube_vos
from model.errors import DatasetError


def write(path: Path, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 3)).save(path)
    return path


def write_list(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    for name in ("bear", "camel", "goat"):
        for index in range(3):
            write(tmp_path / f"JPEGImages/480p/{name}/{index:05d}.jpg")
            write(tmp_path / f"Annotations/480p/{name}/{index:05d}.png")
    write_list(tmp_path / "ImageSets/2016/train.txt", "goat", "bear")
    return tmp_path


def test_davis_lists_the_sequences_of_the_split_with_all_frames_and_masks(davis: Path) -> None:
    goat, bear = davis16(davis, "train")
    assert (goat.name, bear.name, bear.category) == ("goat", "bear", None)
    assert [path.relative_to(davis).as_posix() for path in bear.frames] == [
        f"JPEGImages/480p/bear/0000{index}.jpg" for index in range(3)
    ]
    assert [path.relative_to(davis).as_posix() for path in bear.masks if path] == [
        f"Annotations/480p/bear/0000{index}.png" for index in range(3)
    ]


def test_the_frame_lists_of_davis_2016_are_read_too(davis: Path) -> None:
    (davis / "ImageSets/2016/train.txt").unlink()
    write_list(
        davis / "ImageSets/480p/val.txt",
        *(
            f"/JPEGImages/480p/{name}/{index:05d}.jpg /Annotations/480p/{name}/{index:05d}.png "
            for name in ("camel", "bear")
            for index in range(3)
        ),
    )
    assert [(sequence.name, len(sequence.frames)) for sequence in davis16(davis, "val")] == [
        ("camel", 3),
        ("bear", 3),
    ]


def test_davis_without_a_list_says_where_one_should_be(davis: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected .*2016/val\.txt or .*480p/val\.txt"):
        davis16(davis, "val")


def test_a_frame_of_davis_without_a_mask_is_an_error(davis: Path) -> None:
    (davis / "Annotations/480p/bear/00001.png").unlink()
    with pytest.raises(DatasetError, match=r"must have a mask, .*bear/00001\.jpg has none"):
        davis16(davis, "train")


def test_a_listed_sequence_that_is_not_there_is_an_error(davis: Path) -> None:
    write_list(davis / "ImageSets/2016/val.txt", "lucia")
    with pytest.raises(DatasetError, match=r"no such folder: .*480p/lucia"):
        davis16(davis, "val")


def test_an_empty_list_is_an_error(davis: Path) -> None:
    write_list(davis / "ImageSets/2016/val.txt", "")
    with pytest.raises(DatasetError, match=r"val\.txt is empty"):
        davis16(davis, "val")


@pytest.fixture
def vos(tmp_path: Path) -> Path:
    for video in ("003234408d", "0043f083b5"):
        for index in (0, 5, 10):
            write(tmp_path / f"train/JPEGImages/{video}/{index:05d}.jpg")
            write(tmp_path / f"train/Annotations/{video}/{index:05d}.png", "P")
    return tmp_path


def test_youtube_vos_lists_every_video(vos: Path) -> None:
    videos = youtube_vos(vos)
    assert [video.name for video in videos] == ["003234408d", "0043f083b5"]
    assert [path.stem for path in videos[0].frames] == ["00000", "00005", "00010"]


def test_youtube_vos_lists_the_videos_asked_for(vos: Path) -> None:
    single = write_list(vos / "single.txt", "0043f083b5")
    assert [video.name for video in youtube_vos(vos, single)] == ["0043f083b5"]


def test_a_frame_that_is_not_annotated_has_no_mask(vos: Path) -> None:
    (vos / "train/Annotations/003234408d/00000.png").unlink()
    assert [mask is None for mask in youtube_vos(vos)[0].masks] == [True, False, False]


def test_a_mask_without_a_frame_is_an_error(vos: Path) -> None:
    (vos / "train/JPEGImages/003234408d/00005.jpg").unlink()
    with pytest.raises(DatasetError, match=r"no frame for .*00005\.png"):
        youtube_vos(vos)


def test_a_frame_without_a_number_is_an_error(vos: Path) -> None:
    write(vos / "train/JPEGImages/003234408d/cover.jpg")
    with pytest.raises(DatasetError, match=r"must end in its number, .*cover\.jpg"):
        youtube_vos(vos)


def test_duts_pairs_photos_with_masks(tmp_path: Path) -> None:
    for name in ("sun_b", "ILSVRC_1"):
        write(tmp_path / f"DUTS-TR/DUTS-TR-Image/{name}.jpg")
        write(tmp_path / f"DUTS-TR/DUTS-TR-Mask/{name}.png")
    assert [(still.image.name, still.mask.name) for still in duts(tmp_path)] == [
        ("ILSVRC_1.jpg", "ILSVRC_1.png"),
        ("sun_b.jpg", "sun_b.png"),
    ]


def test_a_photo_of_duts_without_a_mask_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"DUTS-TR/DUTS-TR-Image/{name}.jpg")
    write(tmp_path / "DUTS-TR/DUTS-TR-Mask/a.png")
    with pytest.raises(DatasetError, match=r"no mask for .*b\.jpg"):
        duts(tmp_path)


@pytest.mark.parametrize("reader", [duts, youtube_vos, youtube_objects])
def test_a_folder_that_holds_nothing_of_the_data_set_is_an_error(reader, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=str(tmp_path)):
        reader(tmp_path)


def test_youtube_objects_is_read_class_by_class(tmp_path: Path) -> None:
    for category in ("aeroplane", "cat"):
        for number in range(1, 13):
            write(tmp_path / f"JPEGImages/{category}/0002/{number:05d}.jpg")
        for number in (1, 11):
            write(tmp_path / f"Annotations/{category}/0002/{number:05d}.png")
    plane, cat = youtube_objects(tmp_path)
    assert (plane.name, plane.category, cat.category) == ("aeroplane/0002", "aeroplane", "cat")
    assert [index for index, mask in enumerate(plane.masks) if mask is not None] == [0, 10]


def test_youtube_objects_is_read_as_its_masks_were_published(tmp_path: Path) -> None:
    shot = tmp_path / "dog/data/0028/shots/001"
    for number in range(9, 13):
        write(shot / f"images/frame{number:04d}.jpg")
    write(shot / "labels/00000011.jpg")
    (dog,) = youtube_objects(tmp_path)
    assert (dog.name, dog.category) == ("dog/0028/001", "dog")
    assert [path.stem for path in dog.frames] == ["frame0009", "frame0010", "frame0011", "frame0012"]
    assert [mask and mask.stem for mask in dog.masks] == [None, None, "00000011", None]


FOREGROUND = np.array([[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=np.bool_)


def annotation(kind: str) -> Image.Image:
    ones = FOREGROUND.astype(np.uint8)
    match kind:
        case "bits":
            return Image.fromarray(FOREGROUND)
        case "levels from 0 to 255":
            return Image.fromarray(ones * 255)
        case "levels of 0 and 1":
            return Image.fromarray(ones)
        case "16-bit levels":
            return Image.fromarray(ones.astype(np.uint16) * 256)
        case "palette":
            # Black for object 1, as a palette of indices alone has it; white for what is no object.
            indices = Image.fromarray(ones * np.arange(1, 5, dtype=np.uint8)).convert("P")
            indices.putpalette([255, 255, 255, 0, 0, 0, 0, 128, 0, 128, 0, 0, 9, 9, 9])
            return indices
        case "colours":
            return Image.fromarray(ones[..., None] * np.array([0, 0, 128], dtype=np.uint8))
        case "opaque colours":
            return Image.fromarray(np.dstack([ones * 128, ones * 0, ones * 0, np.full_like(ones, 255)]))
        case "opaque levels":
            return Image.merge("LA", [Image.fromarray(ones * 255), Image.new("L", (4, 3), 255)])
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "bits",
        "levels from 0 to 255",
        "levels of 0 and 1",
        "16-bit levels",
        "palette",
        "colours",
        "opaque colours",
        "opaque levels",
    ],
)
def test_any_value_but_zero_is_foreground(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    annotation(kind).save(path)
    mask = read_mask(path)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, FOREGROUND)


def test_a_jpeg_mask_is_cut_in_the_middle_of_its_range(tmp_path: Path) -> None:
    square = np.zeros((48, 64), dtype=np.uint8)
    square[13:35, 21:43] = 255
    path = tmp_path / "mask.jpg"
    Image.fromarray(square).save(path, quality=75)
    assert (read_frame(path)[..., 0] != square).any()
    np.testing.assert_array_equal(read_mask(path), square > 0)


def test_frames_come_as_rgb(tmp_path: Path) -> None:
    frame = read_frame(write(tmp_path / "grey.jpg"))
    assert (frame.shape, frame.dtype) == ((3, 4, 3), np.uint8)


@pytest.mark.parametrize("read", [read_frame, read_mask])
@pytest.mark.parametrize("content", [None, b"not an image"], ids=["missing", "broken"])
def test_what_cannot_be_read_is_named(read, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "00000.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"cannot read .*00000\.png"):
        read(path)
