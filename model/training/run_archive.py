"""Packs the run of a recipe into a few files of limited size, to resume it on another machine."""

import gzip
import io
import tarfile
import zlib
from pathlib import Path

from model.errors import CheckpointError
from model.training.checkpoint import SETTINGS_NAME, replacing
from model.training.presets import Recipe
from model.training.recipe import CURVE_NAME, SUMMARY_NAME
from model.training.trainer import CHECKPOINT_NAME, HISTORY_NAME, LOG_NAME, WEIGHTS_NAME, is_finished

PART_NAME = "run.tar.gz"


def archive_run(run: Path, recipe: Recipe) -> bytes:
    """A compressed archive of all that is needed to resume a run from its last checkpoint.

    It holds the checkpoint of the phase that was trained last, or its weights if that phase is finished.
    """
    phase = newest_weights(run).parent
    steps = {one.name: one.steps for one in recipe.phases}[phase.name]
    needed = [run / name for name in (SETTINGS_NAME, LOG_NAME, SUMMARY_NAME, CURVE_NAME)]
    needed += sorted(run.glob(f"*/{HISTORY_NAME}"))
    needed.append(phase / (WEIGHTS_NAME if is_finished(phase, steps) else CHECKPOINT_NAME))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in needed:
            archive.add(path, path.relative_to(run))
    return gzip.compress(buffer.getvalue(), compresslevel=1)


def newest_weights(run: Path) -> Path:
    """The averaged weights of the phase that was trained last.

    Raises:
        CheckpointError: No phase has reached a checkpoint.
    """
    found = list(run.glob(f"*/{WEIGHTS_NAME}"))
    if not found:
        raise CheckpointError(f"{run} has no weights of any phase")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def write_parts(content: bytes, folder: Path, part_bytes: int) -> None:
    """Write an archive as ``run.tar.gz.1``, ``.2``, … in place of an earlier one.

    Raises:
        ValueError: It would take more than nine parts.
    """
    if len(content) > 9 * part_bytes:
        raise ValueError(f"{len(content)} bytes take more than nine parts of {part_bytes} bytes")
    stale = set(part_paths(folder))
    for number, first in enumerate(range(0, len(content), part_bytes), start=1):
        path = folder / f"{PART_NAME}.{number}"
        with replacing(path) as unfinished:
            unfinished.write_bytes(content[first : first + part_bytes])
        stale.discard(path)
    for path in stale:
        path.unlink()


def part_paths(folder: Path) -> list[Path]:
    """The parts in a folder, in order."""
    return sorted(folder.glob(f"{PART_NAME}.?"))


def join_parts(folder: Path, run: Path) -> None:
    """Unpack an archive from its parts into a new run folder.

    Raises:
        CheckpointError: The run folder is not empty, or parts are missing or damaged.
    """
    if run.exists() and any(run.iterdir()):
        raise CheckpointError(f"{run} must be empty or missing: give another folder")
    try:
        content = gzip.decompress(b"".join(path.read_bytes() for path in part_paths(folder)))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CheckpointError(f"{folder / PART_NAME}.*: parts are damaged or missing: {error}") from error
    if not content:
        raise CheckpointError(f"{folder} has no {PART_NAME}.1")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(run, filter="data")
