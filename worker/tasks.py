"""The RQ entry point: one attempt at one job, in RQ's forked horse. No torch in here."""

import errno
import hashlib
import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from rq.timeouts import JobTimeoutException

from service.errors import (
    AttemptRefused,
    EngineFailed,
    ImcnetError,
    JobGone,
    JobNotFound,
    JobTimedOut,
    QueueUnavailable,
    StorageFull,
)
from service.jobs import (
    Attempt,
    AttemptEnd,
    EngineInfo,
    JobRecord,
    JobStatus,
    Outcome,
    Problem,
    Progress,
    utc_now,
)
from service.media import out_of_memory
from service.reconciliation import Reconciliation
from service.tally import FRAMES_SEGMENTED, job_finished, stage_seconds
from worker.decode import VideoReader
from worker.engine_process import EngineStream
from worker.pipeline import run_job
from worker.protocol import EngineReady
from worker.settings import WorkerSettings
from worker.spans import SpanDamaged, SpanStore

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 0.5
_SPAN_FORMAT = 3  # to be counted up where spans would come out otherwise than before

preempted = threading.Event()
"""Set in the horse by SIGTERM: give the job back as soon as possible."""


class _Preempted(Exception):
    """The worker is to end; the job goes back to the front of the queue."""


class _Superseded(Exception):
    """The attempt may not publish any more: the job was settled or deleted, or the attempt taken for dead."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What a horse is born with: RQ hands a task nothing but its arguments, so the worker leaves it here."""

    settings: WorkerSettings
    promises: Reconciliation
    worker_name: str
    delivery: str
    engine_socket: Path
    engine_pid: int
    engine: EngineReady


workplace: Workplace | None = None


def segment_video(job_id: str) -> None:
    """Make an attempt at a job, if one is due.

    Whatever it raises ends the attempt as crashed, by the worker: another one may succeed.
    """
    assert workplace is not None, "the worker sets the workplace before its first fork"
    at, storage, queue = workplace, workplace.promises.storage, workplace.promises.queue
    with structlog.contextvars.bound_contextvars(job=job_id):
        with suppress(QueueUnavailable):  # the worker takes the lease with its next heartbeat
            queue.take_lease(at.delivery, at.worker_name)
        try:
            attempt = storage.begin(job_id, delivery=at.delivery, worker=at.worker_name)
        except JobNotFound:
            logger.error("There is no such job in %s", storage.root)
            return
        except (JobGone, AttemptRefused) as refusal:
            logger.info("Nothing to do: %s", refusal)
            return
        with structlog.contextvars.bound_contextvars(attempt=attempt.number):
            with suppress(QueueUnavailable):
                queue.begun(job_id, attempt)
            logger.info("The attempt begins")
            try:
                _make(attempt, storage.load(job_id), at)
            except (_Superseded, JobGone):
                logger.info("The attempt is superseded")
                storage.abandon(attempt)


def _make(attempt: Attempt, record: JobRecord, at: Workplace) -> None:
    """Raises: _Superseded; Exception: The attempt has crashed."""
    try:
        outcome = _run(attempt, record, at)
    except _Preempted:
        logger.info("The attempt is given back")
        at.promises.hand_on(record.id, attempt, AttemptEnd.PREEMPTED)
        return
    except EngineFailed as error:
        logger.warning("The attempt has failed: %s", error.detail)
        at.promises.hand_on(record.id, attempt, AttemptEnd.ENGINE_FAILED)
        return
    except SpanDamaged as error:
        logger.warning("The attempt has failed: %s", error.detail)
        at.promises.hand_on(record.id, attempt, AttemptEnd.DAMAGED)
        return
    except ImcnetError as error:
        logger.warning("The job has failed: %s: %s", error.code, error.detail)
        outcome = _failure(attempt, error, at)
    try:
        decided = at.promises.storage.publish(attempt, outcome, keep_source=at.settings.keep_originals)
    except StorageFull as error:
        logger.warning("The outcome cannot be stored: %s", error.detail)
        at.promises.hand_on(record.id, attempt, AttemptEnd.STORAGE_FULL)
        return
    if not decided:
        raise _Superseded
    logger.info("The job has %s", outcome.status)
    spent = stage_seconds(outcome.timings) if outcome.timings else {}
    at.promises.queue.count({job_finished(outcome): 1, **spent})


def _run(attempt: Attempt, record: JobRecord, at: Workplace) -> Outcome:
    """Raises: _Preempted, _Superseded, ImcnetError; OSError: The storage is out of order."""
    storage = at.promises.storage
    watch = _Watch(record.id, attempt, at)
    stream = EngineStream(
        socket_path=at.engine_socket,
        engine_pid=at.engine_pid,
        tick=watch.tick,
        stall_seconds=at.settings.engine_stall_seconds,
    )
    try:
        prepared = stream.prepare(record.options.quality, timeout_seconds=at.settings.engine_prepare_seconds)
        with VideoReader(
            storage.source(record.id),
            at.settings.media_limits,
            max_corrupt_fraction=at.settings.max_corrupt_fraction,
        ) as video:
            return run_job(
                record,
                video,
                attempt.directory,
                SpanStore(storage.spans(attempt, _span_key(prepared.engine, at)), at.settings.span_frames),
                stream=stream,
                model=at.engine.model,
                prepared=prepared,
                margin_frames=at.engine.margin_frames,
                attempt=attempt.number,
                started_at=attempt.record.started_at,
                report=watch.report,
            )
    except JobTimeoutException as error:
        limit = at.settings.job_timeout_seconds
        raise JobTimedOut(f"The job took longer than the {limit} s that it is allowed.") from error
    except MemoryError as error:  # the horse's limit, which is there for videos
        raise out_of_memory() from error
    except OSError as error:
        if not storage.lives(attempt):
            raise _Superseded from error  # what the attempt had open was taken away
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("The storage has no room for the masks.") from error
        raise


def _span_key(engine: EngineInfo, at: Workplace) -> str:
    """Equal for attempts whose spans have equal bytes: a job is not made of two models' masks."""
    facts = (
        _SPAN_FORMAT,
        at.settings.span_frames,
        at.engine.model.model_dump_json(),
        at.engine.input_size,
        engine.model_dump_json(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _failure(attempt: Attempt, error: ImcnetError, at: Workplace) -> Outcome:
    return Outcome(
        status=JobStatus.FAILED,
        attempt=attempt.number,
        started_at=attempt.record.started_at,
        finished_at=utc_now(),
        error=Problem.of(error),
        model=at.engine.model,
    )


class _Watch:
    """Looks out for reasons to stop, and tells how far the job is; both twice a second at most."""

    def __init__(self, job_id: str, attempt: Attempt, at: Workplace) -> None:
        self._job_id = job_id
        self._attempt = attempt
        self._storage = at.promises.storage
        self._queue = at.promises.queue
        self._next_look = self._next_report = 0.0
        self._counted_frames: int | None = None

    def tick(self) -> None:
        """Raises: _Preempted, _Superseded."""
        if preempted.is_set():
            raise _Preempted
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _REPORT_SECONDS
            if not self._storage.lives(self._attempt):
                raise _Superseded

    def report(self, progress: Progress) -> None:
        if time.monotonic() >= self._next_report or progress.phase == "publishing":
            self._next_report = time.monotonic() + _REPORT_SECONDS
            with suppress(QueueUnavailable):  # a job goes on without Redis; only its progress is not seen
                self._queue.report(self._job_id, progress)
            self._count(progress.frames_done)

    def _count(self, frames_done: int) -> None:
        """The first report of a resumed attempt tells frames that were done before."""
        before = frames_done - 1 if self._counted_frames is None else self._counted_frames
        self._counted_frames = frames_done
        self._queue.count({FRAMES_SEGMENTED: max(0, frames_done - before)})
