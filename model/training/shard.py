"""A small copy of the development data in one file, for a machine with neither the data nor a video decoder.

A shard is a zip file with ``index.json`` and, for each picture, ``<part>/<number>.webp`` and its mask as
``.png``. The mask of a cut-out is the alpha channel of its image.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.errors import DatasetError
from model.training.checkpoint import replacing
from model.training.pictures import Picture
from model.training.stored_pictures import (
    PARTS,
    Part,
    PictureIndex,
    StoredPictures,
    TrainingPictures,
    Video,
)

_SHARES: dict[Part, float] = {"davis16": 0.35, "further": 0.2, "cutouts": 0.06, "scenes": 0.04}
_WEBP_QUALITY = 75
_OVERHEAD = 450  # bytes a picture takes besides image and mask: its entries in archive and index
_PROBED = 24  # pictures that are encoded to estimate the size of a part
_INDEX = "index.json"


class Shard(TrainingPictures):
    """The pictures of a shard. Each part is decoded into memory when first used, 4 * side² bytes a picture.

    Raises:
        DatasetError: The file is missing or is not a shard.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(self._decoded)
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                stored = json.loads(archive.read(_INDEX))
            self.side = int(stored["side"])
            self._indices = {part: PictureIndex.of_json(stored["parts"][part]) for part in PARTS}
        except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{path} is not a readable shard: {error}") from error

    def _decoded(self, part: Part) -> StoredPictures:
        index = self._indices[part]
        pixels = np.empty((len(index.names), 4, self.side, self.side), np.uint8)
        try:
            with zipfile.ZipFile(self._path) as archive, ThreadPoolExecutor() as threads:
                tasks = []
                for place, target in enumerate(pixels):
                    files = [archive.read(name) for name in _members(part, place)]
                    tasks.append(threads.submit(_decode, target, files))
                for task in tasks:
                    task.result()
        except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
            raise DatasetError(f"cannot read {part} of the shard {self._path}: {error}") from error
        return StoredPictures(pixels, index)


def write_shard(data: TrainingPictures, path: Path, max_bytes: int, *, side: int = 384) -> None:
    """Write as much of the data into one file as fits.

    - Every n-th frame of every video, held-out videos included. n is the smallest for which DAVIS takes about
      35 % of the bytes and the further sequences 20 %.
    - Cut-outs (6 %) and scenes (4 %), in a fixed random order.
    - Stills in the rest, also in a fixed random order, without the held-out ones.

    Args:
        max_bytes: Largest size of the file.
        side: Side of the pictures in pixels, at most that of the data.

    Raises:
        ValueError: ``max_bytes`` is too small for a picture of every part, or ``side`` is too large.
        DatasetError: A part is missing or cannot be read.
    """
    sources = {part: _source(data, part) for part in _SHARES}
    indices: dict[Part, PictureIndex] = {}
    left = max_bytes
    with replacing(path) as unfinished:
        with zipfile.ZipFile(unfinished, "w") as archive:
            for part, pictures in sources.items():
                share = int(_SHARES[part] * max_bytes)
                indices[part], size = _add(archive, part, pictures, share, side)
                left -= size
            indices["stills"], _ = _add(archive, "stills", data.stills(), left, side)
            stored = {"side": side, "parts": {part: index.as_json() for part, index in indices.items()}}
            archive.writestr(_INDEX, json.dumps(stored), zipfile.ZIP_DEFLATED)
        if (size := unfinished.stat().st_size) > max_bytes:
            raise ValueError(f"the shard would take {size} bytes, more than the {max_bytes} allowed")


def _source(data: TrainingPictures, part: Part) -> StoredPictures:
    return data.cutouts() if part == "cutouts" else data.part(part)


def _add(
    archive: zipfile.ZipFile, part: Part, pictures: StoredPictures, budget: int, side: int
) -> tuple[PictureIndex, int]:
    """Add a choice of pictures to a shard.

    Returns:
        Their index, and the bytes that they take. Videos may exceed the budget.
    """
    if pictures.videos:
        step = _frame_step(part, pictures, budget, side)
        chosen = [frame for video in pictures.videos for frame in video[::step]]
    else:
        step = 1
        chosen = np.random.default_rng(0).permutation(len(pictures)).tolist()
    names, used = pictures.names, 0
    written: list[tuple[str, float, bool]] = []
    for place in chosen:
        picture = pictures.read(place, side)
        files = _encode(part, picture, side)
        size = sum(map(len, files)) + _OVERHEAD
        if not pictures.videos and used + size > budget:
            break
        for name, content in zip(_members(part, len(written)), files, strict=True):
            archive.writestr(name, content)
        written.append((names[place], picture.aspect, picture.soft))
        used += size
    if not written:
        raise ValueError(f"{budget} bytes of the shard are too few for {part}")
    shown, aspects, soft = zip(*written, strict=True)
    videos = _thinned(pictures, step)
    return PictureIndex(shown, aspects, soft, videos, pictures.frame_step * step), used


def _frame_step(part: Part, pictures: StoredPictures, budget: int, side: int) -> int:
    """Estimate the smallest step at which the frames fit."""
    probed = np.linspace(0, len(pictures) - 1, min(_PROBED, len(pictures))).round().astype(int)
    sizes = [sum(map(len, _encode(part, pictures.read(int(place), side), side))) for place in probed]
    return max(1, int(np.ceil(len(pictures) * (float(np.mean(sizes)) + _OVERHEAD) / max(1, budget))))


def _thinned(pictures: StoredPictures, step: int) -> tuple[Video, ...]:
    videos, first = [], 0
    for name, frames in zip(pictures.video_names, pictures.videos, strict=True):
        videos.append(Video(name, first, first + len(frames[::step])))
        first = videos[-1].end
    return tuple(videos)


def _members(part: Part, place: int) -> tuple[str, ...]:
    """Names of the files of a picture in a shard."""
    image = f"{part}/{place}.webp"
    return (image,) if part == "cutouts" else (image, f"{part}/{place}.png")


def _encode(part: Part, picture: Picture, side: int) -> tuple[bytes, ...]:
    """The files of ``_members``."""
    pixels = picture.pixels.permute(1, 2, 0).numpy()
    size = (side, side)
    if part == "cutouts":
        # Premultiplied, so that the black around the object does not darken its border.
        weighted = Image.fromarray(pixels).convert("RGBa").resize(size, Image.Resampling.BILINEAR)
        return (_webp(weighted.convert("RGBA")),)
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3])).resize(size, Image.Resampling.BILINEAR)
    mask = Image.fromarray(np.ascontiguousarray(pixels[..., 3])).resize(size, Image.Resampling.BOX)
    if picture.soft:
        # 16 levels, as in the originals.
        mask = mask.point([17 * round(value / 17) for value in range(256)])
    else:
        mask = mask.point([255 * (value >= 128) for value in range(256)]).convert("1")
    buffer = io.BytesIO()
    mask.save(buffer, "PNG", optimize=True)
    return _webp(image), buffer.getvalue()


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_WEBP_QUALITY)
    return buffer.getvalue()


def _decode(target: NDArray[np.uint8], files: Sequence[bytes]) -> None:
    """Decode the files that ``_encode`` made into ``target``, ``(4, side, side)``."""
    image, *masks = (Image.open(io.BytesIO(content)) for content in files)
    if masks:
        target[:3] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        target[3] = np.asarray(masks[0].convert("L"))
    else:
        target[:] = np.asarray(image.convert("RGBA")).transpose(2, 0, 1)
