"""A cache of decoded pictures on disk, which opens as a memory map.

A cache is two files: ``<name>.pixels``, the bytes of ``(N, 4, side, side)``, and ``<name>.json``, the index
with checksums and the identity of the originals. The index is written last: without it, the pixels are
ignored.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.errors import DatasetError
from model.training.checkpoint import replacing
from model.training.stored_pictures import PictureIndex, StoredPictures, Video

_CHECKED = 16  # pictures whose checksums are compared when a cache is opened


@dataclass(frozen=True)
class Entry:
    """A picture to store; the entries of a video are consecutive and in temporal order."""

    name: str
    pixels: NDArray[np.uint8]  # (4, side, side)
    aspect: float
    soft: bool
    video: str | None = None


class PictureCache:
    """A named cache in a folder.

    Args:
        name: Stem of its files; caches of different sides need different names.
        side: Side of the pictures in pixels.
    """

    def __init__(self, folder: Path, name: str, side: int) -> None:
        self._folder, self._side = folder, side
        self._pixels, self._index = folder / f"{name}.pixels", folder / f"{name}.json"
        self._lock = folder / f"{name}.lock"

    def open(self) -> StoredPictures | None:
        """The stored pictures, whatever they were made from; None if the cache is missing or damaged."""
        return self._read(None)

    def open_or_build(self, made_of: str, entries: Callable[[], Iterable[Entry]]) -> StoredPictures:
        """The stored pictures if they were made from the same originals; otherwise build the cache.

        Only one process builds; others wait for it.

        Args:
            made_of: Identity of the originals and of the way they are read.
            entries: Reads the originals.

        Raises:
            DatasetError: The cache cannot be written, or ``entries`` raises it.
        """
        if (found := self._read(made_of)) is not None:
            return found
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._lock):
                if (found := self._read(made_of)) is None:
                    self._build(made_of, entries())
                    found = self._read(made_of)
        except OSError as error:
            raise DatasetError(f"cannot write the picture cache {self._pixels}: {error}") from error
        if found is None:
            raise DatasetError(f"{self._pixels} is damaged right after it was written: check the disk")
        return found

    def _build(self, made_of: str, entries: Iterable[Entry]) -> None:
        self._index.unlink(missing_ok=True)
        stored = []
        checksums = []
        with replacing(self._pixels) as unfinished, unfinished.open("wb") as file:
            for entry in entries:
                raw = entry.pixels.tobytes()
                file.write(raw)
                checksums.append(zlib.crc32(raw))
                stored.append((entry.name, entry.aspect, entry.soft, entry.video))
            if not stored:
                raise DatasetError(f"there are no pictures to store in {self._pixels}")
            file.flush()
            os.fsync(file.fileno())
        names, aspects, soft, videos = zip(*stored, strict=True)
        index = PictureIndex(names, aspects, soft, tuple(_videos(videos)))
        state = {"made_of": made_of, "side": self._side, "checksums": checksums, "index": index.as_json()}
        with replacing(self._index) as unfinished:
            unfinished.write_text(json.dumps(state))

    def _read(self, made_of: str | None) -> StoredPictures | None:
        try:
            state = json.loads(self._index.read_text())
            if state["side"] != self._side or made_of not in (None, state["made_of"]):
                return None
            index = PictureIndex.of_json(state["index"])
            shape = (len(index.names), 4, self._side, self._side)
            if self._pixels.stat().st_size != np.prod(shape):
                return None
            pixels = np.memmap(self._pixels, np.uint8, "r", shape=shape)
            checked = np.linspace(0, len(pixels) - 1, min(_CHECKED, len(pixels))).round().astype(int)
            if any(zlib.crc32(pixels[place].tobytes()) != state["checksums"][place] for place in checked):
                return None
        except (OSError, ValueError, LookupError, TypeError):  # missing or damaged: it can be built again
            return None
        return StoredPictures(pixels, index)


def _videos(of_pictures: Iterable[str | None]) -> Iterator[Video]:
    """Group consecutive pictures of the same video."""
    name, first, place = None, 0, 0
    for place, current in enumerate((*of_pictures, None)):
        if current != name:
            if name is not None:
                yield Video(name, first, place)
            name, first = current, place


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
