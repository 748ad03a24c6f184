"""Reads the packed development data: videos with zipped masks, archives of stills, cut-outs and scenes."""

import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.errors import DatasetError
from model.training.picture_cache import Entry, PictureCache
from model.training.stored_pictures import Part, StoredPictures, TrainingPictures, prefix

_FORMAT = 2  # increase it when the same files give different pixels
# Stills with soft masks: made by a network, or true alpha.
_SOFT = frozenset({"teacher", "matte", "alpha"})
_PATTERNS: dict[Part, tuple[str, ...]] = {
    "davis16": ("davis16/train/*.mp4", "davis16/train/*.masks.zip"),
    "further": ("sequences/*.mp4", "sequences/*.masks.zip"),
    "stills": ("stills/stills.tar", "stills/stills-2.zip"),
    "cutouts": ("cutouts/*.webp",),
    "scenes": ("scenes/*.webp",),
}


class PackedData(TrainingPictures):
    """The development data as memory maps of square pictures; each part is opened when first used.

    A part is decoded once into ``cache``, with 4 * side² bytes a picture: at 416 pixels, all parts take
    8.6 GB and two and a half minutes of one core. It is decoded again if its files have changed or the cache
    is damaged. If the packed files are missing, the cache is enough. The validation split of DAVIS is never
    read.

    Args:
        root: Folder with ``davis16/train``, ``sequences``, ``stills``, ``cutouts`` and ``scenes``.
        cache: Folder for the caches of this ``root`` only.
        side: Side of the pictures in pixels: the largest size of samples.
    """

    def __init__(self, root: Path, cache: Path, *, side: int) -> None:
        super().__init__(self._cached)
        self._root, self._cache, self.side = root, cache, side

    def _cached(self, part: Part) -> StoredPictures:
        cache = PictureCache(self._cache, f"{part}-{self.side}", self.side)
        files = [sorted(self._root.glob(pattern)) for pattern in _PATTERNS[part]]
        if not any(files):
            if (found := cache.open()) is None:
                raise DatasetError(
                    f"{part}: no {self._root / _PATTERNS[part][0]}, "
                    f"and no intact cache of {self.side} pixels a side in {self._cache}"
                )
            return found
        for pattern, found_files in zip(_PATTERNS[part], files, strict=True):
            if not found_files:
                raise DatasetError(f"{part} is incomplete: no {self._root / pattern}")
        made_of = _identity([path for group in files for path in group], self._root, self.side)
        return cache.open_or_build(made_of, lambda: self._entries(part))

    def _entries(self, part: Part) -> Iterator[Entry]:
        match part:
            case "davis16":
                return _sequences(self._root / "davis16" / "train", self.side)
            case "further":
                return _sequences(self._root / "sequences", self.side)
            case "stills":
                return _stills(self._root / "stills", self.side)
            case "cutouts":
                return _cutouts(self._root / "cutouts", self.side)
            case "scenes":
                return _scenes(self._root / "scenes", self.side)


def _identity(files: list[Path], root: Path, side: int) -> str:
    """A digest of the names and contents of all files."""
    digest = hashlib.sha256(f"{_FORMAT} {side}".encode())
    for path in files:
        try:
            digest.update(f"\n{path.relative_to(root)}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DatasetError(f"cannot read {path}: {error}") from error
    return digest.hexdigest()


def _sequences(folder: Path, side: int) -> Iterator[Entry]:
    for video in sorted(folder.glob("*.mp4")):
        archive = video.with_suffix(".masks.zip")
        masks = _archived(archive)
        frames = 0
        for frame in _frames(video):
            try:
                mask = next(masks)[1].convert("L")
            except StopIteration:
                raise DatasetError(
                    f"{archive} has {frames} masks, but {video.name} has more frames"
                ) from None
            yield _entry(f"{video.stem}/{frames:05d}", frame, mask, side, video=video.stem)
            frames += 1
        if next(masks, None) is not None:
            raise DatasetError(f"{archive} has more masks than the {frames} frames of {video.name}")


def _frames(video: Path) -> Iterator[Image.Image]:
    import av  # not needed if there is a cache
    from av.error import FFmpegError

    try:
        with av.open(str(video)) as container:
            for frame in container.decode(video=0):
                yield Image.fromarray(frame.to_ndarray(format="rgb24"))
    except FFmpegError as error:
        raise DatasetError(f"cannot read the video {video}: {error}") from error


def _stills(folder: Path, side: int) -> Iterator[Entry]:
    for name in ("stills.tar", "stills-2.zip"):
        images: dict[str, bytes] = {}
        masks: dict[str, bytes] = {}
        for member, content in _members(folder / name):
            kind = images if member.startswith("Image/") else masks
            kind[Path(member).stem] = content
        if images.keys() != masks.keys():
            stem = min(images.keys() ^ masks.keys())
            raise DatasetError(f"{folder / name}: {stem} has no {'mask' if stem in images else 'image'}")
        for stem in sorted(images):
            image, mask = (_decode(kind[stem], f"{stem} of {folder / name}") for kind in (images, masks))
            yield _entry(stem, image.convert("RGB"), mask.convert("L"), side, soft=prefix(stem) in _SOFT)


def _cutouts(folder: Path, side: int) -> Iterator[Entry]:
    """Objects at their own size on a transparent square; shrunk only if they do not fit."""
    for path in sorted(folder.glob("*.webp")):
        image = _decode(path.read_bytes(), str(path))
        if image.mode != "RGBA":
            raise DatasetError(f"{path} must have an alpha channel, but its mode is {image.mode}")
        canvas = np.zeros((side, side, 4), np.uint8)
        if max(image.size) > side:
            # Premultiplied, so that the colours of transparent pixels do not spread.
            weighted = image.convert("RGBa")
            weighted.thumbnail((side, side), Image.Resampling.BILINEAR)
            image = weighted.convert("RGBA")
        canvas[: image.height, : image.width] = np.asarray(image)
        yield Entry(path.stem, _stacked(canvas[..., :3], canvas[..., 3]), aspect=1, soft=True)


def _scenes(folder: Path, side: int) -> Iterator[Entry]:
    for path in sorted(folder.glob("*.webp")):
        image = _decode(path.read_bytes(), str(path)).convert("RGB")
        yield _entry(path.stem, image, Image.new("L", image.size), side)


def _entry(
    name: str,
    image: Image.Image,
    mask: Image.Image,
    side: int,
    *,
    soft: bool = False,
    video: str | None = None,
) -> Entry:
    if mask.size != image.size:
        raise DatasetError(
            f"the mask of {name} must have the size of its image, {image.size}, got {mask.size}"
        )
    colours = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    coverage = np.asarray(mask.resize((side, side), Image.Resampling.BOX))
    return Entry(name, _stacked(colours, coverage), image.width / image.height, soft, video)


def _stacked(colours: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([colours.transpose(2, 0, 1), mask[None]])


def _archived(path: Path) -> Iterator[tuple[str, Image.Image]]:
    for member, content in _members(path):
        yield member, _decode(content, f"{member} of {path}")


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a zip or tar archive, sorted by name."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for info in sorted(archive.infolist(), key=lambda info: info.filename):
                    if not info.is_dir():
                        yield info.filename, archive.read(info)
        else:
            with tarfile.open(path) as tape:
                for member in sorted(tape.getmembers(), key=lambda member: member.name):
                    if (file := tape.extractfile(member)) is not None:
                        yield member.name, file.read()
    except (OSError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise DatasetError(f"cannot read the archive {path}: {error}") from error


def _decode(content: bytes, what: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except OSError as error:
        raise DatasetError(f"cannot read the image {what}: {error}") from error
    return image
