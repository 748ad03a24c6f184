"""Where the public data sets keep their frames and masks. Listing reads folders only; needs no torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.errors import DatasetError

Split = Literal["train", "val"]


@dataclass(frozen=True)
class VideoSequence:
    """The frames of a video in temporal order, each with its mask or, where not annotated, with ``None``."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    category: str | None = None


@dataclass(frozen=True)
class Still:
    """A photo and the mask of its salient object."""

    image: Path
    mask: Path


def davis16(root: Path, split: Split) -> list[VideoSequence]:
    """DAVIS-2016 at 480p; DAVIS-2017's download, whose annotations count as one object, does as well.

    Frames may be PNG files too.

    The split is listed in ``ImageSets/2016/<split>.txt``, one name a line (DAVIS-2017), or in
    ``ImageSets/480p/<split>.txt``, one frame a line (DAVIS-2016).

    Raises:
        DatasetError: A list, folder or mask is not there, or a folder or the list is empty.
    """
    lists = [root / "ImageSets" / kind / f"{split}.txt" for kind in ("2016", "480p")]
    listed = next((path for path in lists if path.is_file()), None)
    if listed is None:
        raise DatasetError(f"no list of the sequences: expected {lists[0]} or {lists[1]}")
    # A line is "bear", or "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png".
    names = [Path(line).parent.name if "/" in line else line for line in _first_words(listed)]
    sequences = [
        _sequence(name, root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name)
        for name in dict.fromkeys(names)
    ]
    for sequence in sequences:
        for frame, mask in zip(sequence.frames, sequence.masks, strict=True):
            if mask is None:
                raise DatasetError(f"every frame of DAVIS must have a mask, {frame} has none")
    return sequences


def youtube_vos(root: Path, single_object_list: Path | None = None) -> list[VideoSequence]:
    """The training videos of YouTube-VOS; the download holds every fifth frame, each with its mask.

    Args:
        single_object_list: A text file with the ids of the videos to take, one a line; all if None.

    Raises:
        DatasetError: The list, a folder or a listed video is not there, or nothing is in it.
    """
    images, annotations = root / "train" / "JPEGImages", root / "train" / "Annotations"
    ids = (
        [folder.name for folder in _subfolders(images)]
        if single_object_list is None
        else _first_words(single_object_list)
    )
    return [_sequence(video, images / video, annotations / video) for video in ids]


def duts(root: Path) -> list[Still]:
    """The training photos of DUTS: ``DUTS-TR/DUTS-TR-Image/*.jpg``, ``DUTS-TR/DUTS-TR-Mask/*.png``.

    Raises:
        DatasetError: A folder or the mask of a photo is not there, or there are no photos.
    """
    images = _files(root / "DUTS-TR" / "DUTS-TR-Image", ".jpg")
    masks = {path.stem: path for path in _files(root / "DUTS-TR" / "DUTS-TR-Mask", ".png")}
    for image in images:
        if image.stem not in masks:
            raise DatasetError(f"no mask for {image}: expected DUTS-TR-Mask/{image.stem}.png")
    return [Still(image, masks[image.stem]) for image in images]


def youtube_objects(root: Path) -> list[VideoSequence]:
    """YouTube-Objects with segmentation masks for about every tenth frame, in either of two layouts.

    - as networks for this task mostly keep it: ``JPEGImages/<class>/<video>/<frame>.jpg`` and
      ``Annotations/<class>/<video>/<frame>.png``;
    - as Jain and Grauman published the masks: in ``<class>/data/<video>/shots/<shot>``, the folders
      ``images``, ``frame<frame>.jpg``, and ``labels``, ``<frame>.jpg``.

    Frames and masks belong together by their number.

    Raises:
        DatasetError: Neither layout is there, a folder is empty, or masks have no frame.
    """
    if (root / "JPEGImages").is_dir():
        return [
            _sequence(
                f"{category.name}/{video.name}",
                video,
                root / "Annotations" / category.name / video.name,
                category=category.name,
            )
            for category in _subfolders(root / "JPEGImages")
            for video in _subfolders(category)
        ]
    shots = sorted(path.parent for path in root.glob("*/data/*/shots/*/labels"))
    if not shots:
        raise DatasetError(
            f"{root} holds neither JPEGImages/<class>/<video> nor <class>/data/<video>/shots/<shot>/labels"
        )
    sequences = []
    for shot in shots:
        category, _, video, _, number = shot.relative_to(root).parts
        name = f"{category}/{video}/{number}"
        sequences.append(_sequence(name, shot / "images", shot / "labels", category=category))
    return sequences


def read_frame(path: Path) -> NDArray[np.uint8]:
    """The picture as RGB, ``(H, W, 3)``.

    Raises:
        DatasetError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DatasetError(f"cannot read the image {path}: {error}") from error


def read_mask(path: Path) -> NDArray[np.bool_]:
    """The annotation, ``(H, W)``: any level, colour or palette index but 0 is foreground.

    Of a lossy JPEG, values from the middle of the range up are.

    Raises:
        DatasetError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                return np.asarray(image.convert("L")) >= 128
            # Opacity says nothing: colours come with an alpha channel of 255 everywhere.
            opaque = image.convert({"RGBA": "RGB", "LA": "L", "PA": "P"}.get(image.mode, image.mode))
            values = np.asarray(opaque)
    except OSError as error:
        raise DatasetError(f"cannot read the mask {path}: {error}") from error
    foreground: NDArray[np.bool_] = (values != 0).reshape(*values.shape[:2], -1).any(axis=2)
    return foreground


def _sequence(name: str, images: Path, annotations: Path, *, category: str | None = None) -> VideoSequence:
    frames = {_number(path): path for path in _files(images, ".jpg", ".png")}
    masks = {_number(path): path for path in _files(annotations, ".png", ".jpg")}
    without_frame = sorted(masks.keys() - frames.keys())
    if without_frame:
        raise DatasetError(f"no frame for {masks[without_frame[0]]}: expected one of that number in {images}")
    order = sorted(frames)
    return VideoSequence(
        name, tuple(frames[n] for n in order), tuple(masks.get(n) for n in order), category=category
    )


def _number(path: Path) -> int:
    digits = re.search(r"\d+$", path.stem)
    if digits is None:
        raise DatasetError(f"the name of a frame must end in its number, {path} does not")
    return int(digits.group())


def _files(folder: Path, *suffixes: str) -> list[Path]:
    found = sorted(path for path in _entries(folder) if path.suffix.lower() in suffixes)
    if not found:
        raise DatasetError(f"{folder} holds no {' or '.join(suffixes)} files")
    return found


def _subfolders(folder: Path) -> list[Path]:
    found = sorted(path for path in _entries(folder) if path.is_dir())
    if not found:
        raise DatasetError(f"{folder} holds no folders")
    return found


def _entries(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        raise DatasetError(f"no such folder: {folder}")
    return folder.iterdir()


def _first_words(path: Path) -> list[str]:
    if not path.is_file():
        raise DatasetError(f"no such list: {path}")
    words = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not words:
        raise DatasetError(f"the list {path} is empty")
    return words
