"""Small data to train on, made on the spot: rendered scenes, as samples or laid out like the data sets."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.held_out import HELD_OUT_SEQUENCES
from model.scenes import render_scene
from model.training.samples import Sample


class RenderedWindows:
    """A sample source: one window for each seed, always the same, whatever the generator."""

    def __init__(self, seeds: Sequence[int], *, size: int = 64, num_frames: int = 3) -> None:
        self.names = [f"scene {seed}" for seed in seeds]  # as held-out windows have them
        self._samples = []
        for seed in seeds:
            scene = list(render_scene(frames=2 * num_frames - 1, height=size, width=size, seed=seed))[::2]
            frames = np.stack([image for image, _ in scene]).transpose(0, 3, 1, 2)
            masks = np.stack([mask for _, mask in scene])
            shares = torch.from_numpy(masks.astype(np.uint8) * 255)
            self._samples.append(Sample(torch.from_numpy(frames.copy()), shares, shares))

    def cropped(self, size: int) -> Self:
        """The squares of ``size`` pixels around the middle of the object."""
        for place, sample in enumerate(self._samples):
            middle = sample.masks[len(sample.masks) // 2].nonzero().double().mean(dim=0).round().int()
            limit = sample.masks.shape[-1] - size
            top, left = (middle - size // 2).clamp(0, limit).tolist()
            square = (..., slice(top, top + size), slice(left, left + size))
            masks = sample.masks[square]
            self._samples[place] = Sample(sample.frames[square], masks, masks)
        return self

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        sample = self._samples[index]
        assert sample.frames.shape[-1] == size
        return sample


def write_davis16(root: Path, *, train: int = 1, val: int = 1, frames: int = 5, side: int = 64) -> None:
    """DAVIS-2016: sequences train0, train1, … and a held-out one; val0, val1, …"""
    (root / "ImageSets" / "2016").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        names = [f"{split}{number}" for number in range(count)]
        if split == "train":
            names.append(HELD_OUT_SEQUENCES[0])
        (root / "ImageSets" / "2016" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            images, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            scene = render_scene(frames=frames, height=side, width=side + 16, seed=len(split) * 100 + number)
            for index, (image, mask) in enumerate(scene):
                Image.fromarray(image).save(images / f"{index:05d}.jpg", quality=95)
                Image.fromarray(mask).save(masks / f"{index:05d}.png")


def write_duts(root: Path, *, count: int = 4, side: int = 64) -> None:
    """DUTS-TR: stills of scenes."""
    images, masks = (root / "DUTS-TR" / f"DUTS-TR-{kind}" for kind in ("Image", "Mask"))
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in range(count):
        ((image, mask),) = render_scene(frames=1, height=side, width=side + 8, seed=500 + number)
        Image.fromarray(image).save(images / f"{number}.jpg", quality=95)
        Image.fromarray(mask).save(masks / f"{number}.png")


def pack_images(path: Path, images: Sequence[NDArray[np.uint8]], labels: Sequence[int]) -> Path:
    """An npz file of ``(H, W, 3)`` images, as pretraining takes them."""
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "webp", lossless=True)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    webp = np.frombuffer(b"".join(files), np.uint8)
    np.savez(path, webp=webp, offsets=offsets, labels=np.array(labels, np.uint8))
    return path
