"""The queue of jobs: RQ moves the work, and Redis holds what may be lost.

RQ gets *deliveries*: jobs of its own, with ids of their own and nothing in them but the id of a job of ours.
A job may be delivered more than once, and every delivery but the first finds nothing to do; so what RQ does
to a delivery whose worker has died is of no matter. Whether somebody is at a job is said by a lease, a key
that runs out by Redis' clock; no other clock counts.

Nothing here is decisive. ``service.storage`` knows which jobs there are and how they ended, and
``service.reconciliation`` rebuilds from that whatever Redis has lost.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from secrets import token_hex

from redis import Redis
from redis.client import Pipeline
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job as RqJob
from rq.registry import BaseRegistry, FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import as_text
from rq.worker import Worker as RqWorker

from service.broker import translated
from service.errors import QueueFull, QueueUnavailable
from service.events import JobEvents
from service.jobs import Attempt, JobStatus, Progress, QueueState, WorkerInfo
from service.tally import ATTEMPTS_BEGUN, JOBS_DELIVERED, JOBS_REQUEUED, Tally

logger = logging.getLogger(__name__)

TASK = "worker.tasks.segment_video"
QUEUE_NAME = "imcnet"  # one queue: with several, RQ loses a job whose worker dies between pop and start

_RESULT_SECONDS = 60  # not 0: RQ 3.0 then stumbles over executions of workers that have died
_STRAY_SECONDS = 10  # a delivery on its way from the queue to its attempt is nowhere for a moment
_DELIVERING_MS = 5000
_JOB = "imcnet:job:{}"
_PROGRESS = "imcnet:progress:{}"
_LEASE = "imcnet:lease:{}"
_STRAY = "imcnet:stray:{}"
_DELIVERING = "imcnet:delivering:{}"
_WORKER = "imcnet:worker:{}"
_KEYS_OF_A_JOB = (_JOB, _PROGRESS, _STRAY, _DELIVERING)


class JobQueue:
    """The jobs that wait or run.

    Every method raises QueueUnavailable where Redis cannot be reached or does not answer in time.

    Args:
        lease_seconds: A worker silent for this long has lost its job.
    """

    def __init__(
        self,
        connection: Redis,
        *,
        lease_seconds: int = 30,
        job_timeout_seconds: int = 7200,
        max_queued_jobs: int = 100,
    ) -> None:
        self.connection = self._redis = connection
        self._queue = Queue(QUEUE_NAME, connection=connection, serializer=JSONSerializer)
        self._lease_seconds = lease_seconds
        self._job_timeout_seconds = job_timeout_seconds
        self._max_queued_jobs = max_queued_jobs
        self.events = JobEvents(connection)
        self.tally = Tally(connection)

    # -- the API's side ----------------------------------------------------------------------------------

    def ping(self) -> None:
        with translated():
            self._redis.ping()

    def serve(self, storage: str) -> None:
        """Say which storage this queue's jobs are in: its identity."""
        with translated():
            self._redis.set("imcnet:storage", storage)

    def storage(self) -> str | None:
        """The identity of the storage that this queue's jobs are in, if it is known."""
        with translated():
            identity = self._redis.get("imcnet:storage")
            return None if identity is None else as_text(identity)

    def count(self, counts: Mapping[str, float]) -> None:
        """Add to the tally, if Redis is there: nothing is worth failing for it."""
        with suppress(QueueUnavailable):
            self.tally.add(counts)

    def waiting(self) -> int:
        """How many deliveries wait for a worker."""
        with translated():
            return int(self._queue.count)

    def check_room(self) -> None:
        """Raises: QueueFull: As many jobs are waiting as may."""
        waiting = self.waiting()
        if waiting >= self._max_queued_jobs:
            raise QueueFull(f"{waiting} jobs are waiting; the limit is {self._max_queued_jobs}.")

    def deliver(self, job_id: str, *, attempt: int = 0, at_front: bool = False) -> bool:
        """Queue a job for a worker, unless it waits for one already.

        Args:
            attempt: How many attempts there have been, for those who watch.

        Returns:
            Whether this call queued it.
        """
        with translated():
            lock = _DELIVERING.format(job_id)  # an API and a reconciliation may be at it at once
            if not self._redis.set(lock, 1, nx=True, px=_DELIVERING_MS):
                return False
            try:
                before = self._delivery(job_id)
                if self._waits(before):
                    return False
                self._enqueue(job_id, f"{job_id}-{token_hex(4)}", attempt, at_front=at_front)
                self.tally.add({JOBS_DELIVERED: 1, JOBS_REQUEUED: int(before is not None)})
                return True
            finally:
                self._redis.delete(lock)

    def _enqueue(self, job_id: str, delivery: str, attempt: int, *, at_front: bool) -> None:
        with self._redis.pipeline() as pipeline:
            self._queue.enqueue_call(
                TASK,
                args=(job_id,),
                job_id=delivery,
                description=TASK,
                timeout=self._job_timeout_seconds,
                result_ttl=_RESULT_SECONDS,
                failure_ttl=_RESULT_SECONDS,
                at_front=at_front,
                pipeline=pipeline,  # RQ takes one that is still empty
            )
            pipeline.hset(_JOB.format(job_id), "delivery", delivery)
            pipeline.delete(_STRAY.format(job_id))
            self._append_status(job_id, JobStatus.QUEUED, attempt, pipeline)
            pipeline.execute()

    def state(self, job_id: str) -> QueueState:
        """What is known of a job."""
        with translated():
            delivery = self._delivery(job_id)
            if delivery is None:
                return QueueState(workers_alive=len(self._workers()))
            position = self._position(delivery)
            progress = self._redis.hget(_PROGRESS.format(job_id), "progress")
            return QueueState(
                leased=bool(self._redis.exists(_LEASE.format(delivery))),
                position=None if position is None else position + 1,
                progress=Progress.model_validate_json(progress, extra="ignore") if progress else Progress(),
                workers_alive=len(self._workers()),
            )

    def forget(self, job_id: str) -> None:
        """Drop what Redis holds of a job that has ended or is gone.

        While a worker is at it, the lease stays; that worker finds out by itself, and comes here again.
        """
        with translated():
            delivery = self._delivery(job_id)
            if delivery is not None and not self._redis.exists(_LEASE.format(delivery)):
                self._discard(delivery)
                self._redis.delete(*(key.format(job_id) for key in _KEYS_OF_A_JOB))
            else:
                self._redis.delete(_PROGRESS.format(job_id))
            self.events.delete(job_id)

    def workers(self) -> tuple[WorkerInfo, ...]:
        """The workers that are alive, by name."""
        with translated():
            return self._workers()

    # -- the worker's side -------------------------------------------------------------------------------

    def announce(self, worker: WorkerInfo) -> None:
        """Let ``worker`` count as alive until its next announcement is overdue."""
        with translated():
            self._redis.set(_WORKER.format(worker.name), worker.model_dump_json(), ex=self._lease_seconds)

    def renounce(self, worker_name: str) -> None:
        with translated():
            self._redis.delete(_WORKER.format(worker_name))

    def take_lease(self, delivery: str, worker_name: str) -> None:
        """Take the lease before the attempt begins: an attempt that is seen without one counts as dead."""
        with translated():
            self._redis.set(_LEASE.format(delivery), worker_name, ex=self._lease_seconds)

    def begun(self, job_id: str, attempt: Attempt) -> None:
        """Renew the lease of an attempt that has begun, and let those who watch know."""
        delivery = attempt.record.delivery
        key = _PROGRESS.format(job_id)
        with translated(), self._redis.pipeline() as pipeline:
            pipeline.set(_LEASE.format(delivery), attempt.record.worker, ex=self._lease_seconds)
            pipeline.hset(_JOB.format(job_id), "delivery", delivery)
            pipeline.delete(_STRAY.format(job_id))
            # The release before this one reads the attempt here.
            pipeline.hset(key, "attempt", str(attempt.number))
            pipeline.hset(key, "started_at", attempt.record.started_at.isoformat())
            pipeline.hdel(key, "progress")
            pipeline.expire(key, 2 * self._job_timeout_seconds)
            self._append_status(job_id, JobStatus.RUNNING, attempt.number, pipeline)
            pipeline.execute()
            self.tally.add({ATTEMPTS_BEGUN: 1})

    def renew(self, job_id: str, delivery: str, worker_name: str) -> None:
        """Keep, or take again, the lease of the attempt that a delivery led to."""
        with translated(), self._redis.pipeline() as pipeline:
            pipeline.set(_LEASE.format(delivery), worker_name, ex=self._lease_seconds)
            pipeline.hsetnx(_JOB.format(job_id), "delivery", delivery)  # Redis may have been emptied
            pipeline.execute()

    def report(self, job_id: str, progress: Progress) -> None:
        with translated(), self._redis.pipeline() as pipeline:
            key = _PROGRESS.format(job_id)
            pipeline.hset(key, "progress", progress.model_dump_json(exclude={"percent", "eta_s"}))
            pipeline.expire(key, 2 * self._job_timeout_seconds)
            self.events.append(job_id, "progress", progress.model_dump_json(), pipeline=pipeline)
            pipeline.execute()

    def discard(self, delivery: str) -> None:
        """Drop a delivery that is over, and its lease."""
        with translated():
            self._discard(delivery)

    # -- reconciliation's side ---------------------------------------------------------------------------

    def claim_pass(self, *, interval_seconds: float) -> bool:
        """Whether it is this caller's turn to reconcile: all together have one turn an interval."""
        with translated():
            turn_ms = max(1, int(900 * interval_seconds))
            return bool(self._redis.set("imcnet:reconciling", 1, nx=True, px=turn_ms))

    def is_settling(self) -> bool:
        """Whether workers may have been unable to renew their leases until just now.

        If nobody has asked for half a lease, then Redis was away or empty, or all of us were; from then on
        everybody gets a whole lease's time. A worker renews three times a lease, so a shorter gap costs none.
        """
        with translated(), self._redis.pipeline() as pipeline:
            pipeline.set("imcnet:watched", 1, px=500 * self._lease_seconds, get=True)
            pipeline.exists("imcnet:settling")
            watched, settling = pipeline.execute()
            if watched is None:
                self._redis.set("imcnet:settling", 1, ex=self._lease_seconds)
            return watched is None or bool(settling)

    def is_leased(self, delivery: str) -> bool:
        with translated():
            return bool(self._redis.exists(_LEASE.format(delivery)))

    def has_lost(self, job_id: str) -> bool:
        """Whether no delivery is left of a job that waits for a worker.

        One that has left the queue may be on its way to a worker, so it has to be nowhere for 10 s.
        """
        with translated():
            delivery = self._delivery(job_id)
            if delivery is None:
                return True
            if self._position(delivery) is not None:
                return False
            stray, seconds = _STRAY.format(job_id), 6 * _STRAY_SECONDS
            if self._redis.set(stray, 1, nx=True, ex=seconds):
                return False
            if self._redis.ttl(stray) > seconds - _STRAY_SECONDS:
                return False
            self._discard(delivery)
            return True

    def known_jobs(self) -> Iterator[str]:
        """The jobs of which Redis holds anything."""
        with translated():
            patterns = (*_KEYS_OF_A_JOB, JobEvents.key_of("{}"))
            for pattern in patterns:
                for key in self._redis.scan_iter(pattern.format("*"), count=1000):
                    yield as_text(key).rpartition(":")[2]

    def _delivery(self, job_id: str) -> str | None:
        """The last delivery of a job."""
        delivery = self._redis.hget(_JOB.format(job_id), "delivery")
        return None if delivery is None else as_text(delivery)

    def _position(self, delivery: str) -> int | None:
        """From 0; None where the delivery is not in the queue."""
        position = self._redis.lpos(self._queue.key, delivery)
        return position if isinstance(position, int) else None

    def _waits(self, delivery: str | None) -> bool:
        """Whether a delivery is in the queue, or was taken out of it by a worker that has not begun yet."""
        if delivery is None:
            return False
        taken = self._redis.lpos(self._queue.intermediate_queue_key, delivery)
        return self._position(delivery) is not None or taken is not None

    def _discard(self, delivery: str) -> None:
        """RQ's own deletion looks at what dead workers have left, and stumbles over it."""
        try:
            job = RqJob.fetch(delivery, connection=self._redis, serializer=JSONSerializer)
        except NoSuchJobError:
            job = None
        with self._redis.pipeline() as pipeline:
            pipeline.delete(_LEASE.format(delivery))
            pipeline.lrem(self._queue.key, 0, delivery)
            pipeline.lrem(self._queue.intermediate_queue_key, 0, delivery)
            for registry in self._registries():
                for member in self._redis.zrange(registry.key, 0, -1):
                    assert isinstance(member, bytes)
                    if member.decode().partition(":")[0] == delivery:
                        pipeline.zrem(registry.key, member)
            if job is not None:
                pipeline.delete(job.execution_registry.key)
                pipeline.delete(job.key, job.dependents_key, job.dependencies_key, f"rq:results:{delivery}")
            pipeline.execute()

    def _registries(self) -> tuple[BaseRegistry, ...]:
        kinds = (StartedJobRegistry, FinishedJobRegistry, FailedJobRegistry)
        return tuple(kind(queue=self._queue) for kind in kinds)

    def _append_status(self, job_id: str, status: JobStatus, attempt: int, pipeline: Pipeline) -> None:
        self.events.append(
            job_id, "status", json.dumps({"status": status, "attempt": attempt}), pipeline=pipeline
        )

    def _workers(self) -> tuple[WorkerInfo, ...]:
        """Those of RQ's workers whose announcement has not run out; RQ keeps dead ones registered."""
        names = sorted(key.rpartition(":")[2] for key in RqWorker.all_keys(self._redis, self._queue))
        values = self._redis.mget([_WORKER.format(name) for name in names]) if names else []
        return tuple(
            WorkerInfo.model_validate_json(value, extra="ignore") for value in values if value is not None
        )
