"""Small development data as packed: videos with archives of masks, stills in an archive."""

import io
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.scenes import render_scene
from tests.videos import write_video


def png(mask: NDArray[np.bool_]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def pack_sequence(
    folder: Path, name: str, *, frames: int = 4, masks: int | None = None, seed: int = 0
) -> Path:
    """Write ``<name>.mp4`` and ``<name>.masks.zip`` of a rendered scene; by default a mask for each frame."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = list(render_scene(frames=frames, height=48, width=64, seed=seed))
    with zipfile.ZipFile(folder / f"{name}.masks.zip", "w") as archive:
        for index, (_, mask) in enumerate(scene[:masks]):
            archive.writestr(f"{index:05d}.png", png(mask))
    images = [image for image, _ in scene]
    return write_video(folder / f"{name}.mp4", images, codec_options={"preset": "ultrafast", "threads": "1"})


def pack_stills(root: Path, names: Iterable[str]) -> None:
    """Write ``stills/stills.tar``, in which all stills show the same scene."""
    ((image, mask),) = render_scene(frames=1, height=48, width=40, seed=0)
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG")
    (root / "stills").mkdir(parents=True)
    with tarfile.open(root / "stills" / "stills.tar", "w") as archive:
        for name in names:
            _add(archive, f"Image/{name}.jpg", jpeg.getvalue())
            _add(archive, f"Mask/{name}.png", png(mask))


def pack_motion_data(root: Path, *, names: Sequence[str], stills: Iterable[str]) -> None:
    """What the motion set is rendered from: the training sequences ``names``, and stills."""
    for seed, name in enumerate(names):
        pack_sequence(root / "davis16" / "train", name, seed=seed)
    pack_stills(root, stills)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
