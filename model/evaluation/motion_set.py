"""The motion set as a source of sequences: its clips, rendered from the development data into files."""

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from model.datasets import Still, VideoSequence, duts
from model.errors import DatasetError
from model.evaluation.motion_clips import MotionClip, MotionClips, clip_names, kind_of
from model.evaluation.packed import has_packed_stills, unpack_stills
from model.evaluation.sources import davis16_source
from model.held_out import held_out_stills

# Those of HELD_OUT_SEQUENCES that DAVIS-2016 has: the others are small, or show the same few scenes.
BACKGROUND_SEQUENCES = ("bmx-bumps", "breakdance-flare", "car-turn", "mallard-fly")


class MotionSet:
    """The clips of ``model.evaluation.motion_clips``; their kinds are their categories.

    Args:
        root: Folder of the data: packed (``stills/stills.tar``, ``davis16/train``) or unpacked (DUTS, DAVIS).
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names = clip_names()

    def load(self, names: Collection[str], folder: Path) -> list[VideoSequence]:
        """Render clips to ``folder`` in the layout of DAVIS; the frames are PNG files.

        Raises:
            DatasetError: A held-out still or sequence is missing or cannot be read.
        """
        with TemporaryDirectory(prefix="imcnet-motion-") as unpacked:
            clips = MotionClips(self._stills(Path(unpacked)), self._backgrounds(Path(unpacked)))
            sequences = [_write(clips.render(name), name, folder) for name in names]
        listed = folder / "ImageSets" / "2016" / "val.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{name}\n" for name in names))
        return sequences

    def _stills(self, out: Path) -> list[Still]:
        wanted = held_out_stills()
        if has_packed_stills(self._root):
            return unpack_stills(self._root, wanted, out)
        stills = [still for still in duts(self._root) if still.image.stem in wanted]
        if missing := wanted - {still.image.stem for still in stills}:
            raise DatasetError(
                f"{self._root} lacks {len(missing)} of the {len(wanted)} held-out stills: {min(missing)}…"
            )
        return stills

    def _backgrounds(self, out: Path) -> list[VideoSequence]:
        source = davis16_source(self._root, "train")
        if missing := [name for name in BACKGROUND_SEQUENCES if name not in source.names]:
            raise DatasetError(f"{self._root} lacks the held-out sequence {missing[0]}")
        return source.load(BACKGROUND_SEQUENCES, out)


def _write(clip: MotionClip, name: str, folder: Path) -> VideoSequence:
    frames = _write_images(clip.frames, folder / "JPEGImages" / "480p" / name)
    masks = _write_images(clip.masks, folder / "Annotations" / "480p" / name)
    return VideoSequence(name, frames, masks, category=kind_of(name))


def _write_images(images: NDArray[Any], folder: Path) -> tuple[Path, ...]:
    folder.mkdir(parents=True)
    paths = tuple(folder / f"{index:05d}.png" for index in range(len(images)))
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path, compress_level=1)
    return paths
