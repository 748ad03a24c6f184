"""``Idempotency-Key``: a request that is sent again, its answer having been lost, makes no second job.

::

    idempotency/<SHA-256 of the key>    the job that the key stands for, and of what it was made

Whoever works on a request with a key has the key's file locked. So there is one at a time, in all processes:
the others find the job that it made, or the key as free as before. A process that dies lets go of its lock.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from io import FileIO
from pathlib import Path

import anyio
from anyio import to_thread
from pydantic import BaseModel, ConfigDict, ValidationError

from service.durable import disk_errors_translated, sync
from service.errors import InvalidRequest, Misconfigured
from service.jobs import JobOptions

MAX_KEY_LENGTH = 255

_POLL_SECONDS = 0.05


class Claim(BaseModel):
    """A job, and the fingerprint of the request that made it."""

    model_config = ConfigDict(frozen=True)

    job_id: str
    fingerprint: str


def fingerprint_of(video_sha256: str, options: JobOptions) -> str:
    """What tells requests with the same key apart. Options count as given only where they differ."""
    chosen = options.model_dump_json(exclude_defaults=True)
    return hashlib.sha256(f"{video_sha256} {chosen}".encode()).hexdigest()


def check_key(key: str) -> None:
    """Raises: InvalidRequest: ``bad_request``."""
    if not (0 < len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
        raise InvalidRequest(f"Idempotency-Key: takes 1 to {MAX_KEY_LENGTH} printable ASCII characters.")


class HeldKey:
    """A key that nobody else can use at the moment. ``claim`` is None where it stands for nothing.

    Its methods raise StorageFull and StorageUnavailable where the disk refuses.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        file.seek(0)
        try:
            self.claim: Claim | None = Claim.model_validate_json(file.read())
        except ValidationError:  # empty; or its writer died on the way, and so before there was a job
            self.claim = None

    def write(self, claim: Claim) -> None:
        """Let the key stand for a job that is about to be accepted, durably.

        Should it never be accepted, the next who holds the key finds that there is no such job.
        """
        self._store(claim.model_dump_json().encode())
        self.claim = claim

    def release(self) -> None:
        """Let the key stand for nothing."""
        self._store(b"")
        self.claim = None

    def _store(self, data: bytes) -> None:
        with disk_errors_translated():
            self._file.truncate(0)
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())


class IdempotencyKeys:
    """The keys that clients have used, in one directory, which all API processes share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def prepare(self) -> None:
        """Raises: Misconfigured: The directory cannot be created."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Misconfigured(f"The directory {self._root} cannot be used: {error.strerror}.") from error

    def is_used(self, key: str) -> bool:
        """Whether the key stands for a job, or may do so soon."""
        return self._path(key).exists()

    @asynccontextmanager
    async def held(self, key: str) -> AsyncIterator[HeldKey]:
        """Wait until nobody else has the key, and keep it from others meanwhile.

        Raises:
            StorageFull, StorageUnavailable: The disk refuses.
        """
        path = self._path(key)
        while (file := await to_thread.run_sync(_lock, path)) is None:
            await anyio.sleep(_POLL_SECONDS)
        with file:
            held = HeldKey(file)
            try:
                yield held
            finally:
                if held.claim is None:
                    with suppress(OSError):  # an empty file does no harm
                        path.unlink()

    def sweep(self, older_than_seconds: float) -> None:
        """Remove the keys that were first used so long ago."""
        deadline = time.time() - older_than_seconds
        for entry in os.scandir(self._root):
            with suppress(FileNotFoundError):  # another sweeper was faster
                if entry.stat().st_mtime < deadline and (file := _lock(Path(entry.path))) is not None:
                    with file:
                        os.unlink(entry.path)

    def _path(self, key: str) -> Path:
        return self._root / hashlib.sha256(key.encode()).hexdigest()


def _lock(path: Path) -> FileIO | None:
    """Open the file at ``path``, created if need be, so that nobody else can until it is closed.

    Returns:
        None: Somebody else has it.
    """
    with disk_errors_translated():
        file = FileIO(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                sync(path.parent)
                return file
        except (BlockingIOError, FileNotFoundError):
            pass  # the latter: whoever had it locked has removed it
        file.close()
        return None
