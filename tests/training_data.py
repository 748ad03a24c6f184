"""Small data to train on, made on the spot: rendered scenes, as samples or laid out like the data sets."""

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.held_out import HELD_OUT_SEQUENCES, held_out_stills
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


def write_packed(root: Path, *, frames: int = 5) -> None:
    """Development data as packed, tiny: pictures are grey, those of what is held out red.

    DAVIS has the sequences bear and bus besides the held-out ones, the further ones clip-fox and sbi-cars.
    """
    (root / "davis16" / "train").mkdir(parents=True)
    (root / "sequences").mkdir()
    names = ("bear", "bus", "clip-fox", "sbi-cars", *HELD_OUT_SEQUENCES)
    for seed, name in enumerate(names):
        further = name.startswith(("clip-", "sbi-", "cdnet-"))
        folder = root / "sequences" if further else root / "davis16" / "train"
        scene = list(render_scene(frames=frames, height=48, width=80, seed=seed))
        images = [_coloured(image, held_out=name in HELD_OUT_SEQUENCES) for image, _ in scene]
        write_packed_sequence(folder, name, images, [mask for _, mask in scene])
    _write_packed_stills(root / "stills")
    for kind in ("cutouts", "scenes"):
        (root / kind).mkdir()
        for number, name in enumerate(("cats_00001", "teacher_00002", "duts_00003")):
            ((image, mask),) = render_scene(frames=1, height=40, width=56, seed=900 + number)
            layers = [_coloured(image, held_out=False)]
            if kind == "cutouts":
                layers.append(mask.astype(np.uint8)[..., None] * 255)
            Image.fromarray(np.dstack(layers)).save(root / kind / f"{name}.webp", lossless=True)


def write_packed_sequence(
    folder: Path, name: str, images: Sequence[NDArray[np.uint8]], masks: Sequence[NDArray[np.bool_]]
) -> None:
    """``<name>.mp4`` and ``<name>.masks.zip``."""
    import av

    with av.open(str(folder / f"{name}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "10"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    with zipfile.ZipFile(folder / f"{name}.masks.zip", "w") as archive:
        for number, mask in enumerate(masks):
            archive.writestr(f"{number:05d}.png", _encoded(mask, "PNG"))


def _write_packed_stills(folder: Path) -> None:
    """Two stills of every prefix, and two that are held out; masks of teacher, matte and alpha are soft."""
    folder.mkdir()
    held_out = sorted(held_out_stills())[:2]
    first = [f"{prefix}_{number}" for prefix in ("ccp", "pets", "human") for number in "12"]
    hand = ("duts", "ecssd", "pascals", "sod", "iseg", "people", "cats", "cow")
    prefixes = (*hand, "alpha", "matte", "teacher")
    second = [f"{prefix}_{number}" for prefix in prefixes for number in "12"]
    with tarfile.open(folder / "stills.tar", "w") as tape:
        for seed, name in enumerate(first + held_out):
            for member, content in _packed_still(name, 500 + seed, "jpg"):
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tape.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(folder / "stills-2.zip", "w") as archive:
        for seed, name in enumerate(second):
            for member, content in _packed_still(name, 700 + seed, "webp"):
                archive.writestr(member, content)


def _packed_still(name: str, seed: int, suffix: str) -> list[tuple[str, bytes]]:
    ((image, mask),) = render_scene(frames=1, height=48, width=64, seed=seed)
    shares = mask.astype(np.uint8) * 255
    if name.startswith(("teacher", "matte", "alpha")):
        shares = mask.astype(np.uint8) * 204
    coloured = _coloured(image, held_out=name in held_out_stills())
    return [
        (f"Image/{name}.{suffix}", _encoded(coloured, {"jpg": "JPEG", "webp": "WEBP"}[suffix])),
        (f"Mask/{name}.png", _encoded(shares, "PNG")),
    ]


def _coloured(image: NDArray[np.uint8], *, held_out: bool) -> NDArray[np.uint8]:
    if held_out:
        return np.broadcast_to(np.array([230, 20, 20], np.uint8), image.shape).copy()
    return np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)


def _encoded(image: NDArray[np.uint8] | NDArray[np.bool_], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()
