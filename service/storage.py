"""Where a job's files live, and the one place that says how it ended.

::

    identity                    tells this directory from any other
    uploads/<name>.part         a body that is being received
    jobs/<id>/job.json          the accepted job, synced before the 202
             /source            the uploaded video
             /attempt-0002/     the attempt that lives: its drafts, and its right to publish
             /ended-0001-lost/  one that does not, and why
             /spans-<…>/        the finished parts of the job, which outlive attempts
             /artifacts-0002/   an attempt's artifacts; they count once an outcome names them
             /outcome.json      how the job ended: created exclusively, so one attempt or cancel decides
    tombstones/<id>             the job is gone (answers 410 until it is swept, then 404)
    trash/                      what is being made or deleted

Beside these lie what service.idempotency, service.keys and service.ownership keep.

Every change is one rename or link, so no reader ever sees half of one. What an attempt publishes, it links
or renames out of its own directory; to end an attempt is to rename that directory. So an attempt that was
taken for dead and wakes up again can publish nothing, whatever it believes.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from uuid_utils.compat import uuid7

from service.durable import clear, disk_errors_translated, remove_older, sync, write_synced
from service.errors import (
    ArtifactNotFound,
    ArtifactNotReady,
    AttemptRefused,
    JobGone,
    JobNotFound,
    Misconfigured,
)
from service.jobs import (
    Artifact,
    Attempt,
    AttemptEnd,
    AttemptRecord,
    JobRecord,
    JobStatus,
    Outcome,
    read_stored,
    utc_now,
)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ATTEMPT = re.compile(r"attempt-(?P<number>\d{4,})|ended-(?P<ended>\d{4,})-(?P<end>[a-z_]+)")
_TELLING = (FileExistsError, FileNotFoundError)  # that somebody else was faster
_NEWEST_RECORD = 1  # the highest version of job.json that this release gets right


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
            self._identify()
        except OSError as error:
            reason = f"The data directory {self.root} cannot be used: {error.strerror}."
            raise Misconfigured(reason) from error

    @property
    def identity(self) -> str:
        """Equal for all who share this directory, and for nobody else."""
        return (self.root / "identity").read_text()

    def _identify(self) -> None:
        draft = self._trash / f"identity-{uuid4()}"
        write_synced(draft, str(uuid4()).encode())
        with suppress(FileExistsError):
            os.link(draft, self.root / "identity")
        draft.unlink()

    def check_writable(self) -> None:
        """Raises: OSError: A file can be neither created nor synced."""
        probe = self.uploads / f"{uuid4()}.part"
        try:
            write_synced(probe, b"")
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
            StorageFull, StorageUnavailable: The disk refuses; the upload is still where it was.
        """
        staging, job = self._trash / f"accept-{record.id}", self._jobs / record.id
        with disk_errors_translated(but=_TELLING):
            staging.mkdir()
            try:
                write_synced(staging / "job.json", record.model_dump_json().encode())
                upload.rename(staging / "source")
                sync(staging)
                staging.rename(job)
                sync(self._jobs)
            except BaseException:
                if job.exists():
                    job.rename(staging)
                if (staging / "source").exists():
                    (staging / "source").rename(upload)
                shutil.rmtree(staging, ignore_errors=True)
                raise

    # -- looking up --------------------------------------------------------------------------------------

    def load(self, job_id: str) -> JobRecord:
        """Raises: JobNotFound: There never was such a job. JobGone: It has expired or was deleted."""
        try:
            return read_stored(JobRecord, self._directory(job_id) / "job.json")
        except FileNotFoundError:
            if (self._tombstones / job_id).exists():
                raise JobGone from None
            raise JobNotFound from None

    def outcome(self, job_id: str) -> Outcome | None:
        """How the job ended, or None while nothing is decided (or no such job exists)."""
        try:
            return read_stored(Outcome, self._directory(job_id) / "outcome.json")
        except FileNotFoundError:
            return None

    def has_ended(self, job_id: str) -> bool:
        """Whether there is nothing left to do: the job has an outcome, or is not there."""
        directory = self._directory(job_id)
        return (directory / "outcome.json").exists() or not (directory / "job.json").exists()

    def stored_bytes(self, job_id: str) -> int:
        """What all files of a job take, as far as they are still there."""
        total = 0
        for folder, _, names in os.walk(self._directory(job_id)):
            for name in names:
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(folder, name)).st_size
        return total

    def source(self, job_id: str) -> Path:
        """The uploaded video."""
        return self._directory(job_id) / "source"

    def job_ids(self, *, before: str | None = None) -> Iterator[str]:
        """All jobs, the newest first, from the one after ``before`` on."""
        names = sorted((e.name for e in os.scandir(self._jobs) if _UUID.fullmatch(e.name)), reverse=True)
        return (name for name in names if before is None or name < before)

    def unfinished(self) -> Iterator[str]:
        """The jobs without an outcome, the oldest first."""
        return (job_id for job_id in reversed(list(self.job_ids())) if not self.has_ended(job_id))

    def attempts(self, job_id: str) -> list[Attempt]:
        """The attempts at a job, in their order; none once it has ended."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self._directory(job_id)) as entries:
            for entry in entries:
                if match := _ATTEMPT.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # renamed since the directory was listed
                        found.append(_read_attempt(Path(entry.path), match))
        return sorted(found, key=lambda attempt: attempt.number)

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

    def begin(self, job_id: str, *, delivery: str, worker: str) -> Attempt:
        """Begin the next attempt at a job.

        Raises:
            JobNotFound, JobGone: As :meth:`load`.
            AttemptRefused: There is nothing to begin: the job has ended, an attempt at it lives, or it was
                accepted by a newer release, for one.
            StorageFull, StorageUnavailable: The disk refuses.
        """
        if self.load(job_id).version > _NEWEST_RECORD:
            raise AttemptRefused(f"Job {job_id} needs a newer release of the worker.")
        if self.has_ended(job_id):
            raise AttemptRefused(f"Job {job_id} has ended.")
        attempts = self.attempts(job_id)
        if attempts and attempts[-1].end is None:
            raise AttemptRefused(f"Attempt {attempts[-1].number} at job {job_id} is under way.")
        number = attempts[-1].number + 1 if attempts else 1
        directory = self._directory(job_id) / f"attempt-{number:04d}"
        record = AttemptRecord(delivery=delivery, worker=worker, started_at=utc_now())
        draft = self._trash / f"attempt-{uuid4()}"
        with disk_errors_translated(but=_TELLING):
            try:
                draft.mkdir()
                write_synced(draft / "attempt.json", record.model_dump_json().encode())
                draft.rename(directory)  # fails if another worker was faster: a directory that is not empty
            except FileNotFoundError as error:
                raise JobGone from error
            except FileExistsError as error:
                raise AttemptRefused(f"Attempt {number} at job {job_id} is under way.") from error
            except OSError as error:
                if error.errno == errno.ENOTEMPTY:
                    raise AttemptRefused(f"Attempt {number} at job {job_id} is under way.") from error
                raise
            finally:
                clear(draft)
        sync(directory.parent)
        return Attempt(number=number, end=None, directory=directory, record=record)

    def lives(self, attempt: Attempt) -> bool:
        """Whether the attempt may still publish: it was not ended, nor the job settled or removed."""
        return attempt.directory.exists() and not (attempt.directory.parent / "outcome.json").exists()

    def spans(self, attempt: Attempt, key: str) -> Path:
        """Where attempts that make equal bytes, as ``key`` says, share what is finished."""
        return attempt.directory.parent / f"spans-{key}"

    def end(self, attempt: Attempt, end: AttemptEnd) -> bool:
        """End an attempt, whoever's it is. From now on it can publish nothing.

        Returns:
            Whether this call did it. False: it had ended before, or the job is gone.
        """
        grave = attempt.directory.with_name(f"ended-{attempt.number:04d}-{end}")
        try:
            attempt.directory.rename(grave)
        except FileNotFoundError:
            return False
        sync(grave.parent)
        for entry in os.scandir(grave):
            if entry.name != "attempt.json":
                clear(Path(entry.path))
        return True

    def abandon(self, attempt: Attempt) -> None:
        """Remove what is left of an attempt that was superseded, by whatever made it so."""
        clear(attempt.directory)

    def publish(self, attempt: Attempt, outcome: Outcome, *, keep_source: bool = False) -> bool:
        """Decide by an attempt how its job ended, durably, if nobody has yet and the attempt lives.

        A success publishes the artifacts in ``attempt.directory / "artifacts"``.

        Returns:
            Whether this call decided.
        Raises:
            StorageFull, StorageUnavailable: The disk refuses.
        """
        job = attempt.directory.parent
        try:
            if outcome.status is JobStatus.SUCCEEDED:
                published = job / f"artifacts-{attempt.number:04d}"
                (attempt.directory / "artifacts").rename(published)
                sync(job)
                outcome = outcome.model_copy(update={"workspace": published.name})
            else:
                _make_room(attempt)
            return self._decide(job, attempt.directory / "outcome.json", outcome, keep_source=keep_source)
        except FileNotFoundError:
            return False

    def conclude(self, job_id: str, outcome: Outcome, *, keep_source: bool = False) -> bool:
        """Decide from outside of any attempt how a job ended, durably, if nobody has yet.

        Returns:
            Whether this call decided. False: the job has an outcome already, or is gone.
        Raises:
            StorageFull, StorageUnavailable: The disk refuses.
        """
        job = self._directory(job_id)
        try:
            return self._decide(job, job / f".outcome-{uuid4()}", outcome, keep_source=keep_source)
        except FileNotFoundError:
            return False

    def _decide(self, job: Path, draft: Path, outcome: Outcome, *, keep_source: bool) -> bool:
        """Raises: FileNotFoundError: The directory of ``draft``, or ``job``, is not there any more."""
        if (job / "outcome.json").exists():  # the usual way to lose, and on a full disk the only one
            return False
        with disk_errors_translated(but=_TELLING):
            try:
                write_synced(draft, outcome.model_dump_json().encode())
                os.link(draft, job / "outcome.json")
            except FileExistsError:
                return False
            finally:
                draft.unlink(missing_ok=True)
        sync(job)
        _tidy(job, outcome, keep_source=keep_source)
        return True

    # -- removing ----------------------------------------------------------------------------------------

    def tidy(self, job_id: str, outcome: Outcome, *, keep_source: bool = False) -> None:
        """Remove what a job that has ended needs no more, had its worker died before it could."""
        with suppress(FileNotFoundError):
            _tidy(self._directory(job_id), outcome, keep_source=keep_source)

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
        remove_older(self.uploads, upload_idle_seconds)
        remove_older(self._trash, upload_idle_seconds)
        remove_older(self._tombstones, tombstone_seconds)

    def _directory(self, job_id: str) -> Path:
        if not _UUID.fullmatch(job_id):  # also keeps "../" and NUL out of every path
            raise JobNotFound
        return self._jobs / job_id


def _read_attempt(directory: Path, match: re.Match[str]) -> Attempt:
    """Raises: FileNotFoundError: It has ended, or been removed, since it was found."""
    end = match["end"]
    return Attempt(
        number=int(match["number"] or match["ended"]),
        end=AttemptEnd(end) if end else None,
        directory=directory,
        record=read_stored(AttemptRecord, directory / "attempt.json"),
    )


def _make_room(attempt: Attempt) -> None:
    """Remove what an attempt that fails for good has made: the word of it may need the room."""
    drafts = (path for path in attempt.directory.iterdir() if path.name != "attempt.json")
    for path in (*drafts, *attempt.directory.parent.glob("spans-*")):
        clear(path)


def _tidy(job: Path, outcome: Outcome, *, keep_source: bool) -> None:
    needed = {"job.json", "outcome.json", outcome.workspace, "source" if keep_source else None}
    for entry in list(os.scandir(job)):  # an attempt that still runs finds out, and lets go
        if entry.name not in needed:
            clear(Path(entry.path))
