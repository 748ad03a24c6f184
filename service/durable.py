"""Files that survive a crash of the machine, and the clearing away of those that nobody needs."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from service.errors import StorageFull, StorageUnavailable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
            elif not in_use(entry.path):
                os.unlink(entry.path)


@contextmanager
def disk_errors_translated(*, but: tuple[type[OSError], ...] = (FileExistsError,)) -> Iterator[None]:
    """What the block asks of the disk may fail for reasons that are not the request's.

    Args:
        but: Errors that mean something to the caller.

    Raises:
        StorageFull: There is no room left.
        StorageUnavailable: Anything else is wrong with it: read-only, broken, not mounted.
    """
    try:
        yield
    except but:
        raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageFull("The storage has no room left.") from error
        raise StorageUnavailable("The storage cannot be used at the moment; try again later.") from error


def _file_system_time(directory: Path) -> float:
    probe = directory / f"{uuid4()}.now"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def in_use(path: str | Path) -> bool:
    """Whether somebody has the file locked, such as an upload what it receives. Raises: FileNotFoundError."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
