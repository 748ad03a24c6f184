"""Where a job's files live, and the one place that says how it ended.

::

    uploads/<name>.part        a body that is being received
    jobs/<id>/job.json         the accepted job, synced before the 202
             /source           the uploaded video
             /attempt-<…>/     an attempt's; its artifacts count once an outcome names it
             /outcome.json     how the job ended: created exclusively, so one attempt or cancel decides
    tombstones/<id>            the job is gone (answers 410 until it is swept, then 404)
    trash/                     what is being deleted

Every change is one rename or link, so no reader ever sees half of one.
"""

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from uuid_utils.compat import uuid7

from service.errors import (
    ArtifactNotFound,
    ArtifactNotReady,
    JobGone,
    JobNotFound,
    Misconfigured,
    StorageFull,
)
from service.jobs import Artifact, JobRecord, JobStatus, Outcome

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def new_job_id() -> str:
    """A UUID version 7 (RFC 9562): unguessable, and sorted by the time of its making."""
    return str(uuid7())


class JobStorage:
    """The jobs below one directory, which the API and all workers share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uploads = root / "uploads"
        self._jobs = root / "jobs"
        self._tombstones = root / "tombstones"
        self._trash = root / "trash"

    def prepare(self) -> None:
        """Create the directories.

        Raises:
            Misconfigured: They cannot be created or written.
        """
        try:
            for directory in (self.uploads, self._jobs, self._tombstones, self._trash):
                directory.mkdir(parents=True, exist_ok=True)
            self.check_writable()
        except OSError as error:
            reason = f"The data directory {self.root} cannot be used: {error.strerror}."
            raise Misconfigured(reason) from error

    def check_writable(self) -> None:
        """Raises: OSError: A file can be neither created nor synced."""
        probe = self.uploads / f"{uuid4()}.part"
        try:
            _write_synced(probe, b"")
        finally:
            probe.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    # -- accepting ---------------------------------------------------------------------------------------

    def new_upload(self) -> Path:
        """Where to receive a body; nothing exists there yet."""
        return self.uploads / f"{uuid4()}.part"

    def accept(self, record: JobRecord, upload: Path) -> None:
        """Turn a received file into a job, durably. ``upload`` is moved.

        Raises:
            StorageFull: The disk is full; the upload is still where it was.
        """
        staging = self._trash / f"accept-{record.id}"
        with _full_disk_is_storage_full():
            staging.mkdir()
            try:
                _write_synced(staging / "job.json", record.model_dump_json().encode())
                upload.rename(staging / "source")
                sync(staging)
                staging.rename(self._jobs / record.id)
            except BaseException:
                if (staging / "source").exists():
                    (staging / "source").rename(upload)
                shutil.rmtree(staging, ignore_errors=True)
                raise
        sync(self._jobs)

    # -- looking up --------------------------------------------------------------------------------------

    def load(self, job_id: str) -> JobRecord:
        """Raises: JobNotFound: There never was such a job. JobGone: It has expired or was deleted."""
        try:
            return JobRecord.model_validate_json((self._directory(job_id) / "job.json").read_bytes())
        except FileNotFoundError:
            if (self._tombstones / job_id).exists():
                raise JobGone from None
            raise JobNotFound from None

    def outcome(self, job_id: str) -> Outcome | None:
        """How the job ended, or None while nothing is decided (or no such job exists)."""
        try:
            return Outcome.model_validate_json((self._directory(job_id) / "outcome.json").read_bytes())
        except FileNotFoundError:
            return None

    def settled(self, job_id: str) -> bool:
        """Whether there is nothing left to do: the job has an outcome, or was removed.

        Raises:
            JobNotFound: There never was such a job, here.
        """
        if (self._directory(job_id) / "outcome.json").exists():
            return True
        if (self._directory(job_id) / "job.json").exists():
            return False
        if (self._tombstones / job_id).exists():
            return True
        raise JobNotFound

    def source(self, job_id: str) -> Path:
        """The uploaded video."""
        return self._directory(job_id) / "source"

    def job_ids(self, *, before: str | None = None) -> Iterator[str]:
        """All jobs, the newest first, from the one after ``before`` on."""
        names = sorted((e.name for e in os.scandir(self._jobs) if _UUID.fullmatch(e.name)), reverse=True)
        return (name for name in names if before is None or name < before)

    def artifact(self, job_id: str, name: str) -> tuple[Artifact, Path]:
        """The published artifact of this name, and its file.

        Raises:
            JobNotFound, JobGone: As :meth:`load`.
            ArtifactNotReady: The job has not succeeded.
            ArtifactNotFound: It has, without such an artifact.
        """
        self.load(job_id)
        outcome = self.outcome(job_id)
        if outcome is None or outcome.status is not JobStatus.SUCCEEDED or outcome.workspace is None:
            raise ArtifactNotReady("The job has not succeeded, so there is nothing to download.")
        for artifact in outcome.artifacts:
            if artifact.name == name:
                return artifact, self._directory(job_id) / outcome.workspace / name
        raise ArtifactNotFound("The job has no artifact of this name.")

    # -- working and ending ------------------------------------------------------------------------------

    @contextmanager
    def attempt(self, job_id: str) -> Iterator[Path]:
        """A directory of this attempt's own, removed at the end unless an outcome has published it.

        Raises:
            FileNotFoundError: The job has been deleted meanwhile.
        """
        workspace = self._directory(job_id) / f"attempt-{uuid4()}"
        workspace.mkdir()
        try:
            yield workspace
        finally:
            outcome = self.outcome(job_id)
            if outcome is None or outcome.workspace != workspace.name:
                shutil.rmtree(workspace, ignore_errors=True)

    def conclude(self, job_id: str, outcome: Outcome, *, keep_source: bool = False) -> bool:
        """Decide how the job ended, durably, if nobody has yet.

        Returns:
            Whether this call decided. False: the job has an outcome already, or is gone.
        """
        directory = self._directory(job_id)
        if (directory / "outcome.json").exists():  # the usual way to lose, and on a full disk the only one
            return False
        draft = directory / f".outcome-{uuid4()}"
        with _full_disk_is_storage_full():
            try:
                _write_synced(draft, outcome.model_dump_json().encode())
                os.link(draft, directory / "outcome.json")
            except (FileExistsError, FileNotFoundError):
                return False
            finally:
                draft.unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # removed already
            sync(directory)
            if not keep_source:
                self.source(job_id).unlink(missing_ok=True)
            for entry in list(os.scandir(directory)):  # an attempt that still runs finds out, and lets go
                if entry.name.startswith("attempt-") and entry.name != outcome.workspace:
                    shutil.rmtree(entry.path, ignore_errors=True)
        return True

    # -- removing ----------------------------------------------------------------------------------------

    def remove(self, job_id: str) -> None:
        """Take the job away with all its files, leaving a tombstone; one that is gone already is no error."""
        (self._tombstones / job_id).touch()
        grave = self._trash / f"{job_id}-{uuid4()}"
        try:
            self._directory(job_id).rename(grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)

    def sweep_leftovers(self, *, upload_idle_seconds: float, tombstone_seconds: float) -> None:
        """Remove what crashed processes left behind, and tombstones that have stood long enough."""
        _remove_older(self.uploads, upload_idle_seconds)
        _remove_older(self._trash, upload_idle_seconds)
        _remove_older(self._tombstones, tombstone_seconds)

    def _directory(self, job_id: str) -> Path:
        if not _UUID.fullmatch(job_id):  # also keeps "../" and NUL out of every path
            raise JobNotFound
        return self._jobs / job_id


def sync(path: Path) -> None:
    """Let a finished file, or a directory's entries, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove_older(directory: Path, age_seconds: float) -> None:
    deadline = time.time() - age_seconds
    for entry in os.scandir(directory):
        with suppress(FileNotFoundError):  # another sweeper was faster
            if entry.stat().st_mtime >= deadline:
                continue
            if entry.is_dir():
                shutil.rmtree(entry.path)
            elif not _in_use(entry.path):
                os.unlink(entry.path)


def _in_use(path: str) -> bool:
    """Whether somebody is writing to the file, however slowly: an upload locks what it receives."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def _full_disk_is_storage_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("The storage has no room left.") from error
        raise
