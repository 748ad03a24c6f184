"""Labelled images for pretraining: folders of files, or packed into npz files."""

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from model.errors import DatasetError


class PackedImages(Dataset[tuple[Tensor, int]]):
    """Images and labels from npz files, decoded once into memory.

    A file holds ``webp`` (uint8: encoded images end to end), ``offsets`` (where each begins, and the end)
    and ``labels``. All images are of one size.

    Attributes:
        images: RGB, ``(N, 3, H, W)`` uint8.
        classes: Number of classes, one more than the highest label.

    Raises:
        DatasetError: A file is missing or holds something else, or images differ in size.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        labels = []
        images: list[Tensor] = []
        for path in paths:
            try:
                with path.open("rb") as file, np.load(file) as packed:
                    labels.append(packed["labels"].astype(np.int64))
                    images.append(_decode_all(packed["webp"].tobytes(), packed["offsets"], labels[-1]))
            except (OSError, KeyError, ValueError, BadZipFile) as error:
                raise DatasetError(f"{path}: not packed images: {error}") from error
        if len({part.shape[1:] for part in images}) != 1:
            raise DatasetError(f"expected images of one size in {', '.join(map(str, paths))}")
        self.images = torch.cat(images)
        self.labels = np.concatenate(labels)
        self.classes = int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def image_folder(root: Path, size: int) -> ImageFolder:
    """Images in one folder a class, whatever their sizes: short side to ``size``, then cut to a square.

    Raises:
        DatasetError: There are no such folders or images; or, when it is asked for, one cannot be read.
    """
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    try:
        return ImageFolder(root, transform, loader=_read_image)
    except FileNotFoundError as error:
        raise DatasetError(f"{root}: {error}") from error


def random_views(images: Tensor, generator: torch.Generator, smallest_crop: float) -> Tensor:
    """Crop, mirror and recolour every image of a batch at random, all of them in one resampling.

    Args:
        images: RGB, ``(B, 3, S, S)`` uint8.
        smallest_crop: A view shows at least this share of the area.

    Returns:
        ``(B, 3, S, S)`` uint8.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=generator) * (high - low) + low

    side = uniform(smallest_crop, 1).sqrt()
    stretch = uniform(-0.15, 0.15).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    mirror = uniform(-1, 1).sign()
    zero = torch.zeros(len(images))
    rows = (width * mirror, zero, uniform(-1, 1) * (1 - width), zero, height, uniform(-1, 1) * (1 - height))
    views = torch.stack(rows, dim=1).view(-1, 2, 3).to(images.device)
    grid = functional.affine_grid(views, list(images.shape), align_corners=False)
    sampled = functional.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = (
        values.view(-1, 1, 1, 1).to(images.device) for values in (uniform(0.7, 1.3), uniform(-25, 25))
    )
    return ((sampled - 127.5) * contrast + 127.5 + brightness).clamp(0, 255).to(torch.uint8)


def _decode_all(data: bytes, offsets: NDArray[np.integer[Any]], labels: NDArray[np.int64]) -> Tensor:
    if len(labels) == 0 or len(offsets) != len(labels) + 1:
        raise ValueError(f"{len(labels)} labels, but {len(offsets)} offsets")
    encoded = (data[start:stop] for start, stop in pairwise(offsets.tolist()))
    images = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in encoded]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DatasetError(f"cannot read the image {path}: {error}") from error
