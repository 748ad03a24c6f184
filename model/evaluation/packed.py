"""The packed form of the development data: videos with archives of masks, stills in an archive.

The files written are those that the data's ``unpack.py`` writes: both forms give the same figures.
"""

import tarfile
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from PIL import Image

from model.datasets import Still, VideoSequence
from model.errors import DatasetError

_JPEG_QUALITY = 95
_STILLS = Path("stills", "stills.tar")


def unpack_sequences(videos: Iterable[Path], out: Path) -> list[VideoSequence]:
    """Write frames and masks of packed sequences to ``out``, in the layout of DAVIS.

    Args:
        videos: Files ``<name>.mp4``, each beside its ``<name>.masks.zip``.

    Raises:
        DatasetError: A file is missing or cannot be read, or frames and masks differ in number.
    """
    return [_unpack_sequence(video, out) for video in videos]


def has_packed_stills(root: Path) -> bool:
    """Whether ``root`` holds ``stills/stills.tar``."""
    return (root / _STILLS).is_file()


def unpack_stills(root: Path, names: Collection[str], out: Path) -> list[Still]:
    """Write the stills called ``names`` from ``root/stills/stills.tar`` to ``out``, sorted by name.

    Raises:
        DatasetError: The archive cannot be read, or lacks a still or its mask.
    """
    archive_path = root / _STILLS
    try:
        with tarfile.open(archive_path) as archive:
            members = [one for one in archive.getmembers() if Path(one.name).stem in names]
            archive.extractall(out, members, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise DatasetError(f"cannot read the stills in {archive_path}: {error}") from error
    stills = [Still(out / "Image" / f"{name}.jpg", out / "Mask" / f"{name}.png") for name in sorted(names)]
    for still in stills:
        for path in (still.image, still.mask):
            if not path.is_file():
                raise DatasetError(f"{archive_path} lacks {path.relative_to(out)}")
    return stills


def _unpack_sequence(video: Path, out: Path) -> VideoSequence:
    frames = _unpack_frames(video, out / "JPEGImages" / "480p" / video.stem)
    folder = out / "Annotations" / "480p" / video.stem
    archive_path = video.with_suffix(".masks.zip")
    try:
        with zipfile.ZipFile(archive_path) as archive:
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"cannot read the masks in {archive_path}: {error}") from error
    masks = sorted(folder.glob("*.png"))
    if len(masks) != len(frames):
        raise DatasetError(f"{video} has {len(frames)} frames but {len(masks)} masks in {archive_path}")
    return VideoSequence(video.stem, tuple(frames), tuple(masks))


def _unpack_frames(video: Path, folder: Path) -> Sequence[Path]:
    import av  # optional for the network itself

    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    try:
        with av.open(str(video)) as container:
            for frame in container.decode(video=0):
                paths.append(folder / f"{len(paths):05d}.jpg")
                Image.fromarray(frame.to_ndarray(format="rgb24")).save(paths[-1], quality=_JPEG_QUALITY)
    except (OSError, av.FFmpegError) as error:
        raise DatasetError(f"cannot read the video {video}: {error}") from error
    return paths
