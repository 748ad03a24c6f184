"""From the data sets that a stage names to what a run is fed with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model import datasets
from model.errors import DatasetError
from model.imcnet import IMCNetConfig
from model.training.augmentation import Augmentation, Stills, Windows
from model.training.composites import Composites
from model.training.pictures import Pictures
from model.training.presets import Source, TrainConfig
from model.training.samples import Joined, SampleSource
from model.training.trainer import TrainingData

Dataset = Literal["davis16", "youtube_vos", "youtube_objects", "duts"]
_UNVARIED = Augmentation(flip=0, rotation=0, zoom=(1, 1), colour=0)


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
        """Everything that the stage names.

        Raises:
            DatasetError: The stage names a data set that has no root, or one that cannot be read.
        """
        return TrainingData(
            videos=Joined([(self._videos(name), repeats) for name, repeats in self.config.videos]),
            images=Joined([(self._images(name), repeats) for name, repeats in self.config.images]),
            validation=Windows(
                Pictures.of_videos(datasets.davis16(self._root("davis16"), "val")),
                num_frames=self.network.num_frames,
                frame_stride=self.network.frame_stride,
                augmentation=_UNVARIED,
            ),
        )

    def _videos(self, name: Source) -> SampleSource:
        if name == "composites":
            backgrounds = self._read("davis16") if "davis16" in self.roots else None
            return Composites(self._read("duts"), videos=backgrounds, num_frames=self.network.num_frames)
        return Windows(
            self._read(name),
            num_frames=self.network.num_frames,
            frame_stride=self.network.frame_stride,
            reversal=self.config.reversal,
            stride_jitter=self.config.stride_jitter,
        )

    def _images(self, name: Source) -> SampleSource:
        if name == "composites":
            raise ValueError("composites are windows, not stills")
        return Stills(self._read(name))

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
                return Pictures.of_videos(datasets.davis16(root, "train"))
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
