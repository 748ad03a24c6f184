"""`imcnet segment`: masks for one video or folder of frames, without any service."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from service.cli.serve import WeightsOption
from service.cli.settings import read_settings, require_weights
from service.errors import Misconfigured, UnusableVideo
from service.jobs import Quality
from service.settings import SharedSettings
from worker.settings import WorkerSettings

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def segment(
    source: Annotated[Path, typer.Argument(metavar="VIDEO|FOLDER", help="A video, or a folder of frames.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the masks, one PNG a frame.")],
    weights: WeightsOption = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [IMCNET_DEVICE]")] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Foreground is what is at least this probable.")
    ] = 0.5,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Longest side of the masks; default: as the source.")
    ] = None,
    quality: Annotated[
        Quality,
        typer.Option(help="fast: in 16 bit. multi_scale: the mean of nine looks, in twelve times the time."),
    ] = "exact",
    input_size: Annotated[
        int | None, typer.Option(help="Side of the square that frames are resized to [IMCNET_INPUT_SIZE]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that holds files.")
    ] = False,
) -> None:
    """Segment a video or a folder of frames on this machine.

    A video's masks are named by the number of the frame, a folder's like its frames, in order of their names.
    """
    settings = read_settings(WorkerSettings, weights=weights, device=device, input_size=input_size)
    require_weights(settings)
    _check_paths(source, out, overwrite=overwrite)
    with _open(source) as frames:
        masks = _segment(frames, settings, threshold=threshold, max_side=max_side, quality=quality)
        out.mkdir(parents=True, exist_ok=True)
        for ordinal, mask in enumerate(masks):
            Image.fromarray(mask).save(out / f"{frames.name(ordinal)}.png")


def _segment(
    frames: "_Frames", settings: WorkerSettings, *, threshold: float, max_side: int | None, quality: Quality
) -> Iterable[Mask]:
    # Torch takes seconds to import: only now that there is something to segment.
    from tqdm import tqdm

    from model.engines import load_segmenter
    from model.weights import read_info
    from worker.pipeline import mask_size

    weights = require_weights(settings)
    segmenter = load_segmenter(
        weights,
        quality,
        device=settings.device,
        input_size=settings.input_size,
        exact_backend=settings.exact_backend,
        graphs=settings.graphs,
    )
    if not read_info(weights).trained:
        typer.echo("imcnet: warning: the weights are random, not trained: these masks mean nothing", err=True)
    size = mask_size(frames.height, frames.width, max_side)
    masks = segmenter.segment(frames.images, threshold=threshold, output_size=size, quality=quality)
    return tqdm(masks, total=frames.count, unit="frame", desc="Segmenting")


def _check_paths(source: Path, out: Path, *, overwrite: bool) -> None:
    if not source.exists():
        raise Misconfigured(f"There is no file or folder {source}.")
    if out.exists() and not out.is_dir():
        raise Misconfigured(f"{out} is not a folder.")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise Misconfigured(f"{out} holds files already; give --overwrite to write into it all the same.")


@dataclass(frozen=True, kw_only=True)
class _Frames:
    """Frames of one size, pixels as displayed. ``count`` is None or, of a video, an estimate."""

    images: Iterable[Frame]
    height: int
    width: int
    count: int | None
    names: tuple[str, ...] = ()

    def name(self, ordinal: int) -> str:
        return self.names[ordinal] if self.names else f"{ordinal:08d}"


@contextlib.contextmanager
def _open(source: Path) -> Iterator[_Frames]:
    if source.is_dir():
        yield _open_folder(source)
        return
    from worker.decode import VideoReader

    settings = read_settings(SharedSettings)
    with VideoReader(
        source, settings.media_limits, max_corrupt_fraction=settings.max_corrupt_fraction
    ) as video:
        yield _Frames(
            images=(frame.image for frame in video),
            height=video.height,
            width=video.width,
            count=video.expected_frames,
        )
        for warning in video.warnings:
            typer.echo(f"imcnet: warning: {warning.detail}", err=True)


def _open_folder(folder: Path) -> _Frames:
    """Raises: UnusableVideo: There is no image, or two would get the same name."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    names = tuple(path.stem for path in paths)
    if not paths:
        raise UnusableVideo(f"{folder} holds no images ({', '.join(_IMAGE_SUFFIXES)}).")
    if len(set(names)) < len(names):
        raise UnusableVideo(f"{folder} holds images whose names differ in nothing but the suffix.")
    height, width, _ = _read_image(paths[0]).shape
    images = (_read_image(path, expected=(height, width)) for path in paths)
    return _Frames(images=images, height=height, width=width, count=len(paths), names=names)


def _read_image(path: Path, expected: tuple[int, int] | None = None) -> Frame:
    try:
        with Image.open(path) as image:
            frame = np.asarray(
                image.convert("RGB")
            )  # EXIF rotation is not applied: masks fit the stored pixels
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusableVideo(f"{path} is not a readable image.") from error
    if expected is not None and frame.shape[:2] != expected:
        raise UnusableVideo(
            f"{path} is {frame.shape[:2]}, the frames before it are {expected} (height, width)."
        )
    return frame
