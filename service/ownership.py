"""Whose job is whose, and what each owner's jobs and uploads take.

::

    owners/<key id>/<job id>         the job is of that key; empty
                   /<uuid>.upload    an upload under way: sparse, as long as that may get, and locked
                   /.lock            held by whoever adds a job or an upload

Asking whether a key has a job is one look at one path, whether there is such a job or not: so an id of
somebody else's is answered as one of nobody's, in the same time.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from uuid import uuid4

from service.durable import disk_errors_translated, in_use, sync, write_synced
from service.errors import JobGone, JobNotFound
from service.storage import JobStorage

_ORPHAN_SECONDS = 3600  # far longer than it takes to accept a job after it was entered here
_JOB_ID = re.compile(r"[0-9a-f-]{36}")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an owner's jobs take: how many have not ended, their uploads' bytes, all bytes stored.

    An upload under way counts as the job that it may become.
    """

    active_jobs: int
    queued_bytes: int
    stored_bytes: int

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            active_jobs=self.active_jobs + other.active_jobs,
            queued_bytes=self.queued_bytes + other.queued_bytes,
            stored_bytes=self.stored_bytes + other.stored_bytes,
        )


class Reservation:
    """Room for an upload under way, within its owner's quota. It does not outlive its process."""

    def __init__(self, path: Path, upload_bytes: int) -> None:
        self._path = path
        self._file = FileIO(path, "x+")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.truncate(upload_bytes)
        self.upload_bytes = upload_bytes

    def release(self) -> None:
        """Give the room back; once is enough."""
        with suppress(OSError):  # without its lock it counts for nothing, and the next look removes it
            self._path.unlink(missing_ok=True)
        self._file.close()


class Ownership:
    """The owners of the jobs of one storage."""

    def __init__(self, storage: JobStorage) -> None:
        self._storage = storage
        self._root = storage.root / "owners"

    def owns(self, owner: str, job_id: str) -> bool:
        return _JOB_ID.fullmatch(job_id) is not None and (self._root / owner / job_id).exists()

    def jobs(self, owner: str) -> set[str]:
        with suppress(FileNotFoundError):
            return {name for name in os.listdir(self._root / owner) if _JOB_ID.fullmatch(name)}
        return set()

    @contextmanager
    def locked(self, owner: str) -> Iterator[None]:
        """Keep everybody else, in all processes, from adding jobs or uploads of that owner."""
        with disk_errors_translated():
            (self._root / owner).mkdir(parents=True, exist_ok=True)
            file = (self._root / owner / ".lock").open("w")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def enter(self, owner: str, job_id: str) -> None:
        """Say whose a job is that is about to be accepted, durably."""
        with disk_errors_translated():
            write_synced(self._root / owner / job_id, b"")
            sync(self._root / owner)

    def leave(self, owner: str, job_id: str) -> None:
        """Take back :meth:`enter`: the job was not accepted."""
        (self._root / owner / job_id).unlink(missing_ok=True)

    def reserve(self, owner: str, upload_bytes: int) -> Reservation:
        """Let an upload of at most so many bytes count; the caller has the owner :meth:`locked`."""
        with disk_errors_translated():
            return Reservation(self._root / owner / f"{uuid4()}.upload", upload_bytes)

    def uploads(self, owner: str) -> Usage:
        """What is under way; the caller has the owner :meth:`locked`."""
        sizes = []
        for path in (self._root / owner).glob("*.upload"):
            with disk_errors_translated(), suppress(FileNotFoundError):  # it has just ended
                if in_use(path):
                    sizes.append(path.stat().st_size)
                else:  # its process has died
                    path.unlink()
        return Usage(active_jobs=len(sizes), queued_bytes=sum(sizes), stored_bytes=sum(sizes))

    def usage(self, owner: str) -> Usage:
        """What the jobs take, without the uploads under way."""
        active = queued = stored = 0
        for job_id in self.jobs(owner):
            with suppress(JobNotFound, JobGone, FileNotFoundError):
                if not self._storage.has_ended(job_id):
                    active += 1
                    queued += self._storage.load(job_id).input.bytes
                stored += self._storage.stored_bytes(job_id)
        return Usage(active_jobs=active, queued_bytes=queued, stored_bytes=stored)

    def sweep(self) -> None:
        """Forget the jobs of which not even a tombstone is left."""
        with suppress(FileNotFoundError):
            for owner in os.listdir(self._root):
                for job_id in self.jobs(owner):
                    place = self._root / owner / job_id
                    with suppress(FileNotFoundError):
                        if time.time() - place.stat().st_mtime > _ORPHAN_SECONDS and not self._known(job_id):
                            place.unlink()

    def _known(self, job_id: str) -> bool:
        try:
            self._storage.load(job_id)
        except JobGone:
            return True
        except JobNotFound:
            return False
        return True
