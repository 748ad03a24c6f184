"""Files that survive a crash of the machine, and the clearing away of those that nobody needs."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from service.errors import StorageFull


def sync(path: Path) -> None:
    """Let a finished file, or a directory's entries, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Raises: FileExistsError: There is something at ``path``."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def clear(path: Path) -> None:
    """Remove a file or a whole directory, or what can be removed of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_older(directory: Path, age_seconds: float) -> None:
    """Remove the entries of ``directory`` that have not changed for so long, unless somebody has them locked.

    The time is the file system's own: that of this machine may be another.
    """
    deadline = _file_system_time(directory) - age_seconds
    for entry in os.scandir(directory):
        with suppress(FileNotFoundError):  # another sweeper was faster
            if entry.stat().st_mtime >= deadline:
                continue
            if entry.is_dir():
                shutil.rmtree(entry.path)
            elif not _in_use(entry.path):
                os.unlink(entry.path)


@contextmanager
def full_disk_is_storage_full(detail: str = "The storage has no room left.") -> Iterator[None]:
    """Raises: StorageFull: There was no room for what the block wrote."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(detail) from error
        raise


def _file_system_time(directory: Path) -> float:
    probe = directory / f"{uuid4()}.now"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _in_use(path: str) -> bool:
    """Whether somebody is writing to the file, however slowly: an upload locks what it receives."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
