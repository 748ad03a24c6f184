"""Sources of samples from the data sets of a stage or from the packed data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model import datasets
from model.datasets import VideoSequence
from model.errors import DatasetError
from model.held_out import HELD_OUT_SEQUENCES
from model.imcnet import IMCNetConfig
from model.training.augmentation import (
    STRONG,
    UNVARIED,
    Augmentation,
    SequenceWindows,
    Stills,
    StillWindows,
    Windows,
)
from model.training.motion_composites import MotionComposites, MotionMix
from model.training.pictures import Pictures, PictureSource
from model.training.presets import Source, TrainConfig
from model.training.samples import Joined, Mixture, Sample, SampleSource
from model.training.stored_pictures import TrainingPictures
from model.training.trainer import TrainingData
from model.windows import WindowLayout

Dataset = Source
_MIX = MotionMix()
_HAND = ("duts", "ecssd", "pascals", "sod", "iseg", "people", "cats", "cow", "alpha", "matte")


@dataclass
class Sources:
    """Builds the sources of a stage; every data set is read once, whatever it serves for.

    Args:
        roots: Where the data sets lie.
        single_object_list: Names of the YouTube-VOS videos to take; by default all.
        preload: Keep all pictures in memory, at little more than the stage's size.
    """

    roots: Mapping[Dataset, Path]
    network: IMCNetConfig
    config: TrainConfig
    single_object_list: Path | None = None
    preload: bool = False
    _pictures: dict[Dataset, Pictures] = field(default_factory=dict)

    def data(self) -> TrainingData:
        """Everything that the stage names; held-out sequences of DAVIS's training split validate.

        Raises:
            DatasetError: The stage names a data set that has no root, or one that cannot be read.
        """
        return TrainingData(
            videos=Joined([(self._videos(name), repeats) for name, repeats in self.config.videos]),
            images=Joined([(Stills(self._read(name)), repeats) for name, repeats in self.config.images]),
            validation=self._held_out(),
        )

    def _held_out(self) -> "HeldOutVideos":
        root = self._root("davis16")
        sequences = [one for one in datasets.davis16(root, "train") if one.name in HELD_OUT_SEQUENCES]
        if not sequences:
            raise DatasetError(
                f"the training split of {root} has none of the sequences held out for validation: "
                f"{', '.join(HELD_OUT_SEQUENCES)}"
            )
        layout = WindowLayout(self.network.num_frames, self.network.frame_stride)
        return HeldOutVideos(sequences, layout)

    def _videos(self, name: Source) -> SampleSource:
        return Windows(
            self._read(name),
            num_frames=self.network.num_frames,
            frame_stride=self.network.frame_stride,
        )

    def _read(self, name: Dataset) -> Pictures:
        if name not in self._pictures:
            pictures = self._open(name)
            if self.preload:
                pictures.preload(self.config.size)
            self._pictures[name] = pictures
        return self._pictures[name]

    def _open(self, name: Dataset) -> Pictures:
        root = self._root(name)
        match name:
            case "davis16":
                sequences = datasets.davis16(root, "train")
                return Pictures.of_videos([one for one in sequences if one.name not in HELD_OUT_SEQUENCES])
            case "youtube_vos":
                return Pictures.of_videos(datasets.youtube_vos(root, self.single_object_list))
            case "youtube_objects":
                return Pictures.of_videos(datasets.youtube_objects(root))
            case "duts":
                return Pictures.of_stills(datasets.duts(root))

    def _root(self, name: Dataset) -> Path:
        if name not in self.roots:
            raise DatasetError(f"this training needs the data set {name}: say where it lies")
        return self.roots[name]


def packed_sources(
    data: TrainingPictures,
    *,
    num_frames: int,
    strides: Sequence[int],
    augmentation: Augmentation = STRONG,
) -> dict[str, SampleSource]:
    """All sources of samples in the development data, by name, without held-out pictures.

    Windows of ``num_frames``:

    - ``davis16``, ``further``: videos, each equally likely
    - ``still_windows``: nothing moves but the camera
    - ``composites``: cut-outs and stills, moved

    Images: ``hand_stills``, ``teacher_stills`` (soft masks), ``clothing_stills``, ``other_stills`` (pets and
    people), ``davis16_frames`` and ``further_frames``.

    Args:
        strides: Distances between the frames of a window, in frames of the original video, equally likely.

    Raises:
        DatasetError: A part of the data is missing or cannot be read.
    """
    davis16, further = data.sequences("davis16"), data.sequences("further")
    stills = data.stills()
    windows: dict[str, SampleSource] = {
        name: SequenceWindows(
            pictures,
            num_frames=num_frames,
            strides=strides,
            frame_step=pictures.frame_step,
            augmentation=augmentation,
        )
        for name, pictures in (("davis16", davis16), ("further", further))
    }
    return {
        **windows,
        "still_windows": Mixture(
            [
                (StillWindows(pictures, num_frames=num_frames, augmentation=augmentation), share)
                for pictures, share in ((stills, 0.7), (davis16, 0.15), (further, 0.15))
            ]
        ),
        "composites": motion_composites(data, num_frames=num_frames),
        "hand_stills": Stills(data.stills(_HAND), augmentation=augmentation),
        "teacher_stills": Stills(data.stills(["teacher"]), augmentation=augmentation),
        "clothing_stills": Stills(data.stills(["ccp"]), augmentation=augmentation),
        "other_stills": Stills(data.stills(["pets", "human"]), augmentation=augmentation),
        "davis16_frames": Stills(davis16, augmentation=augmentation),
        "further_frames": Stills(further, augmentation=augmentation),
    }


def motion_composites(data: TrainingPictures, *, num_frames: int, mix: MotionMix = _MIX) -> MotionComposites:
    """Composites of all pictures that are not held out.

    Raises:
        DatasetError: A part of the data is missing or cannot be read.
    """
    frames = [data.sequences("davis16"), data.sequences("further")]
    backgrounds = [(data.scenes(), 0.4), *((pictures, 0.3) for pictures in frames)]
    return MotionComposites(data.stills(), data.cutouts(), backgrounds, num_frames=num_frames, mix=mix)


class HeldOutWindows:
    """Unvaried windows of the held-out sequences, the same in every run.

    Args:
        frame_stride: Distance between neighbouring frames of a window, in frames of the original video.
        every: Frames of the original video from one window's centre to the next. The first and the last frame
            of a sequence are no centres, as in the evaluation of DAVIS.
    """

    def __init__(self, data: TrainingPictures, *, num_frames: int, frame_stride: int, every: int = 8) -> None:
        self._windows: list[tuple[PictureSource, range, tuple[int, ...]]] = []
        names = []
        for kind in ("davis16", "further"):
            known = data.part(kind).video_names
            held_out = [name for name in HELD_OUT_SEQUENCES if name in known]
            pictures = data.sequences(kind, names=held_out, exclude=())
            layout = WindowLayout(num_frames, max(1, round(frame_stride / pictures.frame_step)))
            step = max(1, round(every / pictures.frame_step))
            for name, video in zip(pictures.video_names, pictures.videos, strict=True):
                for centre in range(1 + (len(video) - 3) % step // 2, len(video) - 1, step):
                    self._windows.append((pictures, video, layout.indices(centre, last=len(video) - 1)))
                    names.append(name)
        if missing := set(HELD_OUT_SEQUENCES) - set(names):
            raise DatasetError(f"the data lack the held-out sequence {', '.join(sorted(missing))}")
        self.names = tuple(names)
        """The sequence of each window."""

    def __len__(self) -> int:
        return len(self._windows)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        pictures, video, places = self._windows[index]
        return UNVARIED.apply([pictures.read(video[place], size) for place in places], rng, size)


class HeldOutVideos:
    """Unvaried windows of videos, the same in every run; ``HeldOutWindows`` does this for packed data.

    Args:
        every: Frames from one window's centre to the next.
    """

    def __init__(self, sequences: Sequence[VideoSequence], layout: WindowLayout, *, every: int = 8) -> None:
        self._pictures = Pictures.of_videos(sequences)
        self._windows: list[tuple[int, ...]] = []
        names = []
        for sequence, video in zip(sequences, self._pictures.videos, strict=True):
            for centre in range(1 + (len(video) - 3) % every // 2, len(video) - 1, every):
                places = layout.indices(centre, last=len(video) - 1)
                self._windows.append(tuple(video[place] for place in places))
                names.append(sequence.name)
        self.names = tuple(names)
        """The sequence of each window."""

    def __len__(self) -> int:
        return len(self._windows)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        return UNVARIED.apply([self._pictures.read(place, size) for place in self._windows[index]], rng, size)


def held_out_windows(
    data: TrainingPictures, num_frames: int, stride: int, *, every: int = 8
) -> HeldOutWindows:
    """Windows for validation; ``names`` has the sequence of each.

    Raises:
        DatasetError: A held-out sequence is missing.
    """
    return HeldOutWindows(data, num_frames=num_frames, frame_stride=stride, every=every)
