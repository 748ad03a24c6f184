"""Sources of the sequences to score: read from folders, unpacked, or rendered on demand."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, Protocol

from model.datasets import VideoSequence, davis16
from model.errors import DatasetError
from model.evaluation.packed import unpack_sequences
from model.held_out import HELD_OUT_SEQUENCES

Split = Literal["train", "val", "held-out"]


class SequenceSource(Protocol):
    """Sequences whose names are known before their frames exist as files.

    Attributes:
        names: All of them, in order.
    """

    names: tuple[str, ...]

    def load(self, names: Collection[str], folder: Path) -> list[VideoSequence]:
        """The sequences called ``names``; unpacked or rendered files are written to ``folder``.

        Raises:
            DatasetError: A sequence is incomplete or cannot be read.
        """


class FolderSequences:
    """Sequences that exist as files."""

    def __init__(self, sequences: Iterable[VideoSequence]) -> None:
        self._by_name = {sequence.name: sequence for sequence in sequences}
        self.names = tuple(self._by_name)

    def load(self, names: Collection[str], folder: Path) -> list[VideoSequence]:
        return [self._by_name[name] for name in names]


class PackedSequences:
    """Sequences packed as ``<name>.mp4`` beside ``<name>.masks.zip``."""

    def __init__(self, videos: Iterable[Path]) -> None:
        self._by_name = {video.stem: video for video in videos}
        self.names = tuple(self._by_name)

    def load(self, names: Collection[str], folder: Path) -> list[VideoSequence]:
        return unpack_sequences([self._by_name[name] for name in names], folder)


def davis16_source(root: Path, split: Split) -> SequenceSource:
    """The sequences of a split of DAVIS-2016, packed (``root/davis16/<split>``) or unpacked.

    The split ``held-out`` is ``HELD_OUT_SEQUENCES``, which training leaves out. They are part of ``train``
    and, if that folder exists, of the further sequences in ``root/sequences``.

    Raises:
        DatasetError: ``root`` has no sequence of the split, or another layout.
    """
    source = _source(root, split)
    if not source.names:
        raise DatasetError(f"{root} holds no sequence of the split {split}")
    return source


def _source(root: Path, split: Split) -> SequenceSource:
    if (root / "davis16").is_dir():
        folders = ("davis16/train", "sequences") if split == "held-out" else (f"davis16/{split}",)
        videos = [video for folder in folders for video in sorted((root / folder).glob("*.mp4"))]
        return PackedSequences(one for one in videos if split != "held-out" or one.stem in HELD_OUT_SEQUENCES)
    if split != "held-out":
        return FolderSequences(davis16(root, split))
    return FolderSequences(one for one in davis16(root, "train") if one.name in HELD_OUT_SEQUENCES)
