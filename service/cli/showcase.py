"""What the demo makes beside the job itself: its scene, the contact sheet, and how near the masks come."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.evaluation.jaccard import region_similarity
from model.scenes import render_scene
from service.errors import Misconfigured

_FRAMES, _HEIGHT, _WIDTH, _FPS = 24, 360, 640, 12
_TILES, _TILE_COLUMNS, _TILE_WIDTH = 12, 4, 320


def write_scene(path: Path, truth: Path) -> None:
    """Render a scene to an H.264 file, its masks to the zip file ``truth``, ``{ordinal:08d}.png`` each."""
    with av.open(path, "w", format="mp4") as container, zipfile.ZipFile(truth, "w") as masks:
        stream = container.add_stream("libx264", rate=_FPS, options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = _HEIGHT, _WIDTH, "yuv420p"
        scene = render_scene(frames=_FRAMES, height=_HEIGHT, width=_WIDTH, seed=1)
        for ordinal, (image, mask) in enumerate(scene):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            with masks.open(f"{ordinal:08d}.png", "w") as png:
                Image.fromarray(mask).save(png, "PNG")
        container.mux(stream.encode(None))


def write_contact_sheet(video: Path, path: Path, *, frames: int) -> None:
    """Lay a dozen frames of ``video``, evenly spread over its ``frames``, out on one picture."""
    chosen = set(np.linspace(0, frames - 1, min(_TILES, frames)).round().astype(int).tolist())
    with av.open(video) as container:
        tiles = [_tile(frame) for ordinal, frame in enumerate(container.decode(video=0)) if ordinal in chosen]
    height, width, _ = tiles[0].shape
    columns = min(_TILE_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for position, tile in enumerate(tiles):
        row, column = divmod(position, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
    Image.fromarray(sheet).save(path)


def mean_similarity(archive: Path, truth: Path) -> float:
    """Mean J over all frames of the masks in a job's archive.

    Args:
        truth: A zip file with a PNG for each frame, in the order of their names.

    Raises:
        Misconfigured: There is not one true mask for each frame.
    """
    predicted, true = list(_read_masks(archive)), list(_read_masks(truth))
    if len(predicted) != len(true):
        raise Misconfigured(f"{truth} holds {len(true)} masks, but the video has {len(predicted)} frames.")
    return float(np.mean([region_similarity(*pair) for pair in zip(predicted, true, strict=True)]))


def _tile(frame: av.VideoFrame) -> NDArray[np.uint8]:
    height = max(1, round(frame.height * _TILE_WIDTH / frame.width))
    return np.asarray(Image.fromarray(frame.to_ndarray(format="rgb24")).resize((_TILE_WIDTH, height)))


def _read_masks(path: Path) -> Iterator[NDArray[np.bool_]]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".png")):
            with archive.open(name) as png, Image.open(png) as image:
                yield np.asarray(image.convert("L")) >= 128
