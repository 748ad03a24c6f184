"""Square pictures in one block of memory, their index, and the development data made of them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from model.errors import DatasetError
from model.held_out import HELD_OUT_SEQUENCES, held_out_stills
from model.training.pictures import Picture

Part = Literal["davis16", "further", "stills", "cutouts", "scenes"]
PARTS: tuple[Part, ...] = ("davis16", "further", "stills", "cutouts", "scenes")


@dataclass(frozen=True)
class Video:
    """The pictures from ``first`` up to, but not including, ``end`` are the frames of a video."""

    name: str
    first: int
    end: int


@dataclass(frozen=True)
class PictureIndex:
    """Metadata of stored pictures.

    Args:
        names: Name of each picture: the file's stem, or ``<video>/<frame>``.
        aspects: Width by height of each picture before it was squeezed.
        soft: Whether the annotation of each picture has values between 0 and 255.
        videos: Videos in the order of their frames.
        frame_step: Frames of the original video from one picture to the next.
    """

    names: tuple[str, ...]
    aspects: tuple[float, ...]
    soft: tuple[bool, ...]
    videos: tuple[Video, ...] = ()
    frame_step: int = 1

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.aspects) == len(self.soft):
            raise ValueError("names, aspects and soft must have the same length")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, stored: dict[str, Any]) -> Self:
        """Rebuild an index from ``as_json``.

        Raises:
            ValueError, TypeError or KeyError: ``stored`` is not such an index.
        """
        videos = tuple(Video(**video) for video in stored["videos"])
        lists = {name: tuple(stored[name]) for name in ("names", "aspects", "soft")}
        return cls(**lists, videos=videos, frame_step=int(stored["frame_step"]))


class StoredPictures:
    """A picture source on a block of pixels, or on a selection of it.

    Args:
        pixels: ``(N, 4, side, side)`` uint8, in the order of the index; may be a memory map.
        places: Positions of the pictures that this source shows, in order. Default: all.
        videos: Videos among the shown pictures. Default: those of the index.
    """

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        index: PictureIndex,
        places: Sequence[int] | None = None,
        videos: Sequence[Video] | None = None,
    ) -> None:
        self._pixels, self._index = pixels, index
        self._places = range(len(index.names)) if places is None else places
        shown = index.videos if videos is None else videos
        self.videos: Sequence[range] = tuple(range(video.first, video.end) for video in shown)
        self.video_names = tuple(video.name for video in shown)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._index.names[place] for place in self._places)

    @property
    def frame_step(self) -> int:
        """Frames of the original video from one picture to the next."""
        return self._index.frame_step

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int, size: int) -> Picture:
        """A picture at its stored side, whatever the size of the sample.

        Raises:
            ValueError: Samples of this size need larger pictures.
        """
        if size > self._pixels.shape[-1]:
            raise ValueError(
                f"the pictures are stored with {self._pixels.shape[-1]} pixels a side, "
                f"too few for samples of {size}"
            )
        place = self._places[index]
        pixels = torch.from_numpy(np.array(self._pixels[place]))
        return Picture(pixels, self._index.aspects[place], self._index.soft[place])

    def select(self, keep: Callable[[str], bool]) -> "StoredPictures":
        """The pictures whose name ``keep`` accepts, as single pictures."""
        places = [place for place in self._places if keep(self._index.names[place])]
        return StoredPictures(self._pixels, self._index, places, videos=())

    def select_videos(self, keep: Callable[[str], bool]) -> "StoredPictures":
        """The videos whose name ``keep`` accepts."""
        places: list[int] = []
        videos = []
        for name, frames in zip(self.video_names, self.videos, strict=True):
            if keep(name):
                videos.append(Video(name, len(places), len(places) + len(frames)))
                places += [self._places[frame] for frame in frames]
        return StoredPictures(self._pixels, self._index, places, videos)


class TrainingPictures:
    """The development data by part. Held-out pictures are left out by default.

    Args:
        open_part: Returns all pictures of a part; called once for each part that is used.
    """

    def __init__(self, open_part: Callable[[Part], StoredPictures]) -> None:
        self._open_part = open_part
        self._opened: dict[Part, StoredPictures] = {}

    def part(self, name: Part) -> StoredPictures:
        """All pictures of a part, held-out ones included.

        Raises:
            DatasetError: The part is missing or cannot be read.
        """
        if name not in self._opened:
            self._opened[name] = self._open_part(name)
        return self._opened[name]

    def stills(
        self, prefixes: Collection[str] | None = None, *, exclude: Collection[str] | None = None
    ) -> StoredPictures:
        """Photos with the mask of a salient object.

        Args:
            prefixes: Prefixes of the names, up to the underscore. Default: all.
            exclude: Names to leave out. Default: the held-out stills.

        Raises:
            DatasetError: There are no stills of a prefix.
        """
        stills = self.part("stills")
        wanted = None if prefixes is None else set(prefixes)
        if wanted is not None and (missing := wanted - {prefix(name) for name in stills.names}):
            raise DatasetError(f"there are no stills with the prefix {', '.join(sorted(missing))}")
        left_out = held_out_stills() if exclude is None else frozenset(exclude)
        return stills.select(lambda name: name not in left_out and (wanted is None or prefix(name) in wanted))

    def sequences(
        self,
        kind: Literal["davis16", "further"],
        *,
        names: Collection[str] | None = None,
        exclude: Collection[str] = HELD_OUT_SEQUENCES,
    ) -> StoredPictures:
        """Videos with a mask for every frame.

        Args:
            names: Names of the sequences to take. Default: all.
            exclude: Names to leave out. Default: the held-out sequences.

        Raises:
            DatasetError: There is no sequence of a name.
        """
        part = self.part(kind)
        if names is not None and (missing := set(names) - set(part.video_names)):
            raise DatasetError(f"{kind} has no sequence {', '.join(sorted(missing))}")
        return part.select_videos(lambda name: name not in exclude and (names is None or name in names))

    def cutouts(self) -> StoredPictures:
        """Objects with true alpha on a transparent square, without those cut from held-out stills."""
        held_out = held_out_stills()
        return self.part("cutouts").select(lambda name: name not in held_out)

    def scenes(self) -> StoredPictures:
        """Backgrounds without a salient object: their masks are 0."""
        return self.part("scenes")


def prefix(name: str) -> str:
    """The data set that a still or cut-out comes from: its name up to the underscore."""
    return name.partition("_")[0]
