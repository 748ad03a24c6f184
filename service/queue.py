"""The queue of jobs: RQ moves the work, a hash per job holds how far it is.

Redis only moves work: what was accepted and how it ended is decided in ``service.storage``. RQ gets nothing
but a job id, as JSON; the job's RQ id is the same id, and the worker knows its one task by :data:`TASK`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry as RedisRetry
from rq import Queue, Retry
from rq.exceptions import NoSuchJobError
from rq.job import Job as RqJob
from rq.job import JobStatus as RqStatus
from rq.serializers import JSONSerializer
from rq.utils import as_text
from rq.worker import Worker as RqWorker

from service.errors import Misconfigured, QueueFull, QueueUnavailable
from service.jobs import JobRecord, Progress, QueueState, WorkerInfo, utc_now

TASK = "worker.tasks.segment_video"
QUEUE_NAME = "imcnet"  # one queue: with several, RQ loses a job whose worker dies between pop and start

_RESULT_SECONDS = 60
_FAILURE_SECONDS = 86_400  # RQ would remember for a year that it gave a job up
_PROGRESS = "imcnet:progress:{}"
_WORKER = "imcnet:worker:{}"


def connect(url: str, *, timeout_seconds: float) -> Redis:
    """A client that gives up after ``timeout_seconds``; redis-py would wait a minute on a hung server.

    Raises:
        Misconfigured: ``url`` is no address of a Redis.
    """
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=RedisRetry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise Misconfigured("IMCNET_REDIS_URL must be redis://…, rediss://… or unix://….") from error


class JobQueue:
    """The jobs that wait or run.

    Every method raises QueueUnavailable where Redis cannot be reached or does not answer in time.
    """

    def __init__(
        self,
        connection: Redis,
        *,
        job_timeout_seconds: int = 7200,
        max_attempts: int = 3,
        max_queued_jobs: int = 100,
    ) -> None:
        self._redis = connection
        self._queue = Queue(QUEUE_NAME, connection=connection, serializer=JSONSerializer)
        self._job_timeout_seconds = job_timeout_seconds
        self._max_attempts = max_attempts
        self._max_queued_jobs = max_queued_jobs

    # -- the API's side ----------------------------------------------------------------------------------

    def ping(self) -> None:
        with _translated():
            self._redis.ping()

    def check_room(self) -> None:
        """Raises: QueueFull: As many jobs are waiting as may."""
        with _translated():
            waiting = self._queue.count
        if waiting >= self._max_queued_jobs:
            raise QueueFull(f"{waiting} jobs are waiting; the limit is {self._max_queued_jobs}.")

    def submit(self, record: JobRecord) -> None:
        """Queue an accepted job. One that is queued or running already is left as it is."""
        with _translated():
            if self._fetch(record.id) is not None:
                return
            self._queue.enqueue_call(
                TASK,
                args=(record.id,),
                job_id=record.id,
                description=TASK,
                timeout=self._job_timeout_seconds,
                retry=Retry(max=self._max_attempts - 1) if self._max_attempts > 1 else None,
                # The outcome is in the storage, so Redis may forget the job. Not at once (0), though: RQ 3.0
                # then stumbles over executions of workers that have died.
                result_ttl=_RESULT_SECONDS,
                failure_ttl=_FAILURE_SECONDS,
            )

    def state(self, job_id: str) -> QueueState | None:
        """What is known of a job; None where the queue does not know it (any more)."""
        with _translated():
            job = self._fetch(job_id)
            if job is None:
                return None
            running = job.get_status(refresh=False) is RqStatus.STARTED
            key = _PROGRESS.format(job_id)
            attempt, started_at, progress = self._redis.hmget(key, "attempt", "started_at", "progress")
            position = None if running else job.get_position()
            return QueueState(
                running=running,
                attempt=int(attempt or 0),
                started_at=datetime.fromisoformat(as_text(started_at)) if started_at else None,
                position=None if position is None else position + 1,
                progress=Progress.model_validate_json(progress) if progress else Progress(),
                workers_alive=len(self._workers()),
            )

    def crashed(self, job_id: str) -> bool:
        """Whether RQ has given the job up: its attempts are used up."""
        with _translated():
            job = self._fetch(job_id)
            return job is not None and job.get_status(refresh=False) in (RqStatus.FAILED, RqStatus.STOPPED)

    def forget(self, job_id: str) -> None:
        """Drop what Redis holds of a job; a running attempt notices by itself that its job is settled."""
        with _translated():
            job = self._fetch(job_id)
            if job is not None and job.get_status(refresh=False) is not RqStatus.STARTED:
                self._redis.delete(job.execution_registry.key)  # RQ 3.0 stumbles over expired executions
                job.delete()
            self._redis.delete(_PROGRESS.format(job_id))

    def workers(self) -> tuple[WorkerInfo, ...]:
        """The workers that are alive, by name."""
        with _translated():
            return self._workers()

    # -- the worker's side -------------------------------------------------------------------------------

    def announce(self, worker: WorkerInfo, *, lease_seconds: int) -> None:
        """Let ``worker`` count as alive for the next ``lease_seconds``."""
        with _translated():
            self._redis.set(_WORKER.format(worker.name), worker.model_dump_json(), ex=lease_seconds)

    def renounce(self, worker_name: str) -> None:
        with _translated():
            self._redis.delete(_WORKER.format(worker_name))

    def begin_attempt(self, job_id: str) -> int:
        """Count an attempt as begun.

        Returns:
            Its number, from 1.
        """
        key = _PROGRESS.format(job_id)
        with _translated(), self._redis.pipeline() as pipeline:
            pipeline.hincrby(key, "attempt", 1)
            pipeline.hset(key, "started_at", utc_now().isoformat())  # as in the outcome: the attempt's own
            pipeline.hdel(key, "progress")
            pipeline.expire(key, 2 * self._job_timeout_seconds)
            return int(pipeline.execute()[0])

    def report(self, job_id: str, progress: Progress) -> None:
        with _translated(), self._redis.pipeline() as pipeline:
            key = _PROGRESS.format(job_id)
            pipeline.hset(key, "progress", progress.model_dump_json(exclude={"percent", "eta_s"}))
            pipeline.expire(key, 2 * self._job_timeout_seconds)
            pipeline.execute()

    def _fetch(self, job_id: str) -> RqJob | None:
        try:
            return RqJob.fetch(job_id, connection=self._redis, serializer=JSONSerializer)
        except NoSuchJobError:
            return None

    def _workers(self) -> tuple[WorkerInfo, ...]:
        """Those of RQ's workers whose announcement has not run out; RQ keeps dead ones registered."""
        names = sorted(key.rpartition(":")[2] for key in RqWorker.all_keys(self._redis, self._queue))
        values = self._redis.mget([_WORKER.format(name) for name in names]) if names else []
        return tuple(WorkerInfo.model_validate_json(value) for value in values if value is not None)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        raise QueueUnavailable("The job queue cannot be reached at the moment; try again later.") from error
