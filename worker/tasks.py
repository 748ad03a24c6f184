"""The RQ entry point: one attempt at one job, in RQ's forked horse. No torch in here."""

import errno
import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rq import Retry, get_current_job
from rq.timeouts import JobTimeoutException

from service.errors import (
    EngineFailed,
    ImcnetError,
    JobGone,
    JobNotFound,
    JobTimedOut,
    Misconfigured,
    QueueUnavailable,
    StorageFull,
)
from service.jobs import JobRecord, JobStatus, ModelInfo, Outcome, Problem, Progress, utc_now
from service.queue import JobQueue
from service.storage import JobStorage
from worker.decode import VideoReader
from worker.engine_process import EngineStream
from worker.pipeline import run_job
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 0.5
_UNLIMITED = 1_000_000  # being moved to another worker is no attempt that failed

preempted = threading.Event()
"""Set in the horse by SIGTERM: give the job back as soon as possible."""


class _Preempted(Exception):
    """The worker is to end; the job goes back to the front of the queue."""


class _Settled(Exception):
    """Somebody else has ended the job: a cancel, a deletion or another attempt."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What a horse is born with: RQ hands a task nothing but its arguments, so the worker leaves it here."""

    settings: WorkerSettings
    storage: JobStorage
    queue: JobQueue
    engine_socket: Path
    engine_pid: int
    model: ModelInfo


workplace: Workplace | None = None


def segment_video(job_id: str) -> Retry | None:
    """Work at a job until it has an outcome, unless it has one already.

    Returns:
        A ``Retry`` where the worker was told to end meanwhile.
    Raises:
        EngineFailed, QueueUnavailable, OSError: Another attempt may succeed; RQ queues it.
        Misconfigured: The job is not where this worker looks.
    """
    assert workplace is not None, "the worker sets the workplace before its first fork"
    storage = workplace.storage
    try:
        settled = storage.settled(job_id)
    except JobNotFound as error:
        raise Misconfigured(
            f"Job {job_id} is not in {storage.root}: is that the API's data directory?"
        ) from error
    if settled:
        logger.info("Job %s is settled already", job_id)
        return None
    started_at = utc_now()
    attempt = workplace.queue.begin_attempt(job_id)
    logger.info("Job %s: attempt %d", job_id, attempt)
    try:
        _attempt(storage.load(job_id), attempt, started_at, workplace)
    except _Preempted:
        return Retry(max=_UNLIMITED, enqueue_at_front=True)
    except (_Settled, JobNotFound, JobGone):
        logger.info("Job %s has been settled meanwhile", job_id)
    except ImcnetError as error:
        if isinstance(error, EngineFailed) and _attempts_left():
            raise
        _fail(job_id, attempt, started_at, error)
    with suppress(QueueUnavailable):
        workplace.queue.forget(job_id)
    return None


def _attempt(record: JobRecord, attempt: int, started_at: datetime, at: Workplace) -> None:
    watch = _Watch(record.id, at)
    stream = EngineStream(
        socket_path=at.engine_socket,
        engine_pid=at.engine_pid,
        tick=watch.tick,
        stall_seconds=at.settings.engine_stall_seconds,
    )
    try:
        with (
            at.storage.attempt(record.id) as workspace,
            VideoReader(
                at.storage.source(record.id),
                at.settings.media_limits,
                max_corrupt_fraction=at.settings.max_corrupt_fraction,
            ) as video,
        ):
            outcome = run_job(
                record,
                video,
                workspace,
                stream=stream,
                model=at.model,
                attempt=attempt,
                started_at=started_at,
                report=watch.report,
            )
            at.storage.conclude(record.id, outcome, keep_source=at.settings.keep_originals)
    except JobTimeoutException as error:
        limit = at.settings.job_timeout_seconds
        raise JobTimedOut(f"The job took longer than the {limit} s that it is allowed.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("The storage has no room for the masks.") from error
        if at.storage.settled(record.id):
            raise _Settled from error  # the job's directory was taken away
        raise


def _fail(job_id: str, attempt: int, started_at: datetime, error: ImcnetError) -> None:
    logger.warning("Job %s failed: %s: %s", job_id, error.code, error.detail)
    assert workplace is not None
    outcome = Outcome(
        status=JobStatus.FAILED,
        attempt=attempt,
        started_at=started_at,
        finished_at=utc_now(),
        error=Problem.of(error),
        model=workplace.model,
    )
    workplace.storage.conclude(job_id, outcome, keep_source=workplace.settings.keep_originals)


def _attempts_left() -> bool:
    job = get_current_job()
    return job is not None and job.should_retry


class _Watch:
    """Looks out for reasons to stop, and tells how far the job is; both twice a second at most."""

    def __init__(self, job_id: str, at: Workplace) -> None:
        self._job_id = job_id
        self._storage = at.storage
        self._queue = at.queue
        self._next_look = self._next_report = 0.0

    def tick(self) -> None:
        """Raises: _Preempted, _Settled."""
        if preempted.is_set():
            raise _Preempted
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _REPORT_SECONDS
            if self._storage.settled(self._job_id):
                raise _Settled

    def report(self, progress: Progress) -> None:
        if time.monotonic() >= self._next_report or progress.phase == "publishing":
            self._next_report = time.monotonic() + _REPORT_SECONDS
            with suppress(QueueUnavailable):  # a job goes on without Redis; only its progress is not seen
                self._queue.report(self._job_id, progress)
