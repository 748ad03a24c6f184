"""The worker: RQ's, with an engine beside it that outlives its jobs. No torch in here.

Of RQ as little as possible is overridden: a live engine before each job, leases by Redis' clock, a SIGTERM
that gives the running job back, and no recovery of RQ's own: its retries and clean-ups go by the clocks of
clients and know nothing of the storage. What a dead horse has left is handed on by its worker, and what a
dead worker has left by reconciliation.
"""

import logging
import os
import resource
import signal
import socket
import time
from contextlib import suppress
from types import FrameType
from typing import Any
from uuid import uuid4

import structlog
from pydantic import ValidationError
from redis import Redis
from redis.exceptions import RedisError, ResponseError
from rq import Queue, Worker, worker_registration
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer
from rq.utils import now

from service.broker import connect
from service.errors import ImcnetError, JobNotFound, Misconfigured, QueueUnavailable, StorageUnavailable
from service.jobs import AttemptEnd, WorkerInfo
from service.processes import die_with_parent, limit_resources
from service.queue import QUEUE_NAME, TASK, JobQueue
from service.reconciliation import Reconciliation
from service.storage import JobStorage
from worker import tasks
from worker.engine_process import EngineProcess
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

_REDIS_RETRY_SECONDS = 1.0
_HORSE_OPEN_FILES = 256


def run(settings: WorkerSettings) -> int:
    """Work until told to stop.

    Returns:
        The exit code: 0 after SIGTERM or SIGINT, 1 where Redis was lost and a restart may help.
    Raises:
        Misconfigured: No weights, no such device, no Redis configured, an unusable data directory.
        EngineFailed: The engine cannot be started; a restart may help.
        QueueUnavailable: Redis cannot be reached.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # until RQ takes over; process 1 has no default for them
        signal.signal(number, _leave)
    url = settings.require_redis_url()
    storage = JobStorage(settings.data_dir)
    storage.prepare()
    queue = JobQueue(
        connect(url, timeout_seconds=settings.redis_timeout_seconds),
        lease_seconds=settings.lease_seconds,
        job_timeout_seconds=settings.job_timeout_seconds,
    )
    if queue.storage() not in (None, storage.identity):
        raise Misconfigured(f"{settings.data_dir} is not the data directory that the API uses.")
    promises = Reconciliation(
        storage=storage,
        queue=queue,
        max_attempts=settings.max_attempts,
        keep_source=settings.keep_originals,
    )
    engine = EngineProcess(settings)
    try:
        engine.ensure_running()
        # RQ makes the timeout longer than it waits for a job.
        connection = connect(url, timeout_seconds=settings.redis_timeout_seconds)
        worker = GpuWorker(connection, settings=settings, promises=promises, engine=engine)
        worker.work(logging_level="WARNING")  # at INFO, RQ tells of its maintenance every few seconds
    finally:
        engine.stop()
    if worker.engine_error is not None:
        raise worker.engine_error
    return 0 if worker.told_to_stop else 1


class GpuWorker(Worker):
    """RQ's worker, with a warm engine."""

    max_connection_wait_time = 5.0  # RQ would be up to a minute late when Redis is back

    def __init__(
        self,
        connection: Redis,
        *,
        settings: WorkerSettings,
        promises: Reconciliation,
        engine: EngineProcess,
    ) -> None:
        super().__init__(
            [QUEUE_NAME],
            name=f"{socket.gethostname()}-{uuid4().hex[:12]}",  # a dead worker's name stays taken for a while
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=20,  # RQ waits 15 s less than this for a job before it looks around
            maintenance_interval=max(1, round(settings.reconcile_seconds)),
            job_monitoring_interval=max(1, settings.lease_seconds // 3),
            log_job_description=False,
        )
        self._settings = settings
        self._promises = promises
        self._job_queue = promises.queue
        self._engine = engine
        self.log_result_lifespan = False
        structlog.contextvars.bind_contextvars(worker=self.name)
        self.engine_error: ImcnetError | None = None

    @property
    def told_to_stop(self) -> bool:
        return self._shutdown_requested_date is not None

    # -- one delivery ------------------------------------------------------------------------------------

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        while True:
            self._ensure_engine()  # after a job that killed it, before waiting for the next one
            try:
                return super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)
            except ResponseError as error:  # RQ waits for a Redis that is away, not for one that is full
                logger.warning("Redis refuses to work: %s", error)
                self._wait_for_redis()

    def execute_job(self, job: RqJob, queue: Queue) -> None:
        job_id = _job_of(job)
        if job_id is None:
            logger.error("Delivery %s is none of ours, and is dropped", job.id)
            self._job_queue.discard(job.id)
            return
        self._ensure_engine()
        tasks.workplace = tasks.Workplace(
            settings=self._settings,
            promises=self._promises,
            worker_name=self.name,
            delivery=job.id,
            engine_socket=self._engine.socket,
            engine_pid=self._engine.pid,
            engine=self._engine.ready,
        )
        with structlog.contextvars.bound_contextvars(job=job_id):
            try:
                super().execute_job(job, queue)
            except RedisError as error:
                # RQ would end the worker, and with it a job that needs no Redis to finish.
                logger.warning("Redis does not answer (%s)", type(error).__name__)
                self._reap_horse()
            self._close(job_id, delivery=job.id)
        self._wait_for_redis()

    def _ensure_engine(self) -> None:
        """Have an engine that is alive, and not at work for a job that is over."""
        try:
            self._engine.ensure_running()
            if not self._engine.is_idle(self._settings.engine_release_seconds):
                logger.warning("The engine does not let go of the last job; starting a new one")
                self._engine.replace()
        except ImcnetError as error:
            self.engine_error = error
            raise StopRequested from error  # anything else RQ would log with a traceback and forget

    def _reap_horse(self) -> None:
        if self.horse_pid:  # else there was none yet, and any other child would be waited for
            with suppress(ChildProcessError):
                self.wait_for_horse()
            self._horse_pid = 0

    def _close(self, job_id: str, *, delivery: str) -> None:
        """Hand on an attempt whose horse died without a word, and clear the delivery away."""
        try:
            for attempt in self._promises.storage.attempts(job_id):
                if attempt.end is None and attempt.record.delivery == delivery:
                    logger.warning("The horse of attempt %d has died", attempt.number)
                    self._promises.hand_on(job_id, attempt, AttemptEnd.CRASHED)
            self._job_queue.discard(delivery)
            if self._promises.storage.has_ended(job_id):
                self._job_queue.forget(job_id)
        except (JobNotFound, QueueUnavailable, StorageUnavailable, OSError, ValidationError) as error:
            logger.warning("The job is left to reconciliation: %s", error)

    def _wait_for_redis(self) -> None:
        """RQ would end the worker, and lose a warm engine, where Redis is away or full between two jobs."""
        while not self.told_to_stop:
            try:
                return self._job_queue.announce(self._info())
            except QueueUnavailable:
                time.sleep(_REDIS_RETRY_SECONDS)
        raise StopRequested

    # -- leases ------------------------------------------------------------------------------------------

    def clean_registries(self) -> None:
        """Reconcile, in place of RQ's own recovery."""
        worker_registration.clean_worker_registry(self.queues[0])
        try:
            self._promises.run(interval_seconds=self._settings.reconcile_seconds)
        except QueueUnavailable as error:
            logger.warning("%s", error.detail)
        self.last_cleaned_at = now()  # type: ignore[assignment] # RQ declares it as None

    def get_heartbeat_ttl(self, job: RqJob, working_time: float = 0.0) -> int:
        return self._settings.lease_seconds

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        super().heartbeat(timeout, pipeline)
        worker_registration.register(self, pipeline)  # RQ does it once, but Redis may have been emptied since
        with suppress(QueueUnavailable):
            self._job_queue.announce(self._info())

    def maintain_heartbeats(self, job: RqJob, execution: Execution) -> None:
        try:
            self._job_queue.renew(job.args[0], job.id, self.name)
            super().maintain_heartbeats(job, execution)
        except (QueueUnavailable, RedisError) as error:
            logger.warning("No heartbeat: Redis does not answer (%s)", type(error).__name__)

    # -- stopping ----------------------------------------------------------------------------------------

    def handle_warm_shutdown_request(self) -> None:
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, signal.SIGTERM)

    def set_shutdown_requested_date(self) -> None:
        with suppress(RedisError):  # it is for RQ's own monitoring
            super().set_shutdown_requested_date()

    def fork_work_horse(self, job: RqJob, queue: Queue) -> None:
        super().fork_work_horse(job, queue)
        if self.told_to_stop:  # meanwhile: there was no horse to tell yet
            self.handle_warm_shutdown_request()

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()
        die_with_parent(self.pid)  # without its worker nobody would renew its lease
        limit_resources(
            {
                # Not RLIMIT_AS: of that, threads reserve far more than they use, by the number of cores.
                resource.RLIMIT_DATA: self._settings.decode_memory_bytes,
                resource.RLIMIT_NOFILE: _HORSE_OPEN_FILES,
                resource.RLIMIT_CORE: 0,
            }
        )
        signal.signal(signal.SIGTERM, _give_the_job_back)
        if self.told_to_stop:  # before the fork, or since then, when the worker's handler was still in place
            tasks.preempted.set()

    def teardown(self) -> None:
        self._engine.stop()
        with suppress(QueueUnavailable, RedisError):  # what is not unregistered expires
            self._job_queue.renounce(self.name)
            super().teardown()

    def _info(self) -> WorkerInfo:
        ready = self._engine.ready
        return WorkerInfo(
            name=self.name,
            host=socket.gethostname(),
            device=ready.device,
            engine_pid=self._engine.pid,
            load_s=round(ready.load_s, 3),
            model=ready.model,
        )


def _job_of(delivery: RqJob) -> str | None:
    """The job that a delivery of ours is about. RQ would run whatever function one names, and its callbacks.

    Returns:
        None: It holds anything but our task and the id of a job.
    """
    extras = (
        delivery._success_callback_name,
        delivery._failure_callback_name,
        delivery._stopped_callback_name,
        delivery.webhooks,
    )
    try:
        task, instance = delivery.func_name, delivery.instance
        args, kwargs = delivery.args, delivery.kwargs
    except Exception:  # whatever a serializer makes of what somebody has written there
        return None
    match args:
        case [str(job_id)] if task == TASK and instance is None and not kwargs and not any(extras):
            return job_id
    return None


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _give_the_job_back(signum: int, frame: FrameType | None) -> None:
    tasks.preempted.set()
