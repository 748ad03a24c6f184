"""The worker: RQ's, with an engine beside it that outlives its jobs. No torch in here.

Of RQ as little as possible is overridden: a live engine before each job, leases of our own length, a SIGTERM
that gives the running job back, and an outcome for jobs that RQ gives up.
"""

import logging
import os
import signal
import socket
from contextlib import suppress
from types import FrameType
from typing import Any
from uuid import uuid4

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, Worker, worker_registration
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job as RqJob
from rq.registry import clean_registries
from rq.serializers import JSONSerializer
from rq.utils import now

from service.errors import ImcnetError, QueueUnavailable
from service.jobs import WorkerInfo, given_up
from service.processes import die_with_parent
from service.queue import QUEUE_NAME, JobQueue, connect
from service.storage import JobStorage
from worker import tasks
from worker.engine_process import EngineProcess
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

_MAINTENANCE_SECONDS = 10


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
        job_timeout_seconds=settings.job_timeout_seconds,
        max_attempts=settings.max_attempts,
    )
    queue.ping()
    engine = EngineProcess(settings)
    try:
        engine.ensure_running()
        worker = GpuWorker(
            Redis.from_url(url), settings=settings, storage=storage, queue=queue, engine=engine
        )
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
        storage: JobStorage,
        queue: JobQueue,
        engine: EngineProcess,
    ) -> None:
        super().__init__(
            [QUEUE_NAME],
            name=f"{socket.gethostname()}-{uuid4().hex[:12]}",  # a dead worker's name stays taken for a while
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=20,  # RQ waits 15 s less than this for a job before it looks around
            maintenance_interval=max(1, settings.lease_seconds // 3),
            job_monitoring_interval=max(1, settings.lease_seconds // 3),
            log_job_description=False,
        )
        self._settings = settings
        self._storage = storage
        self._job_queue = queue
        self._engine = engine
        self.log_result_lifespan = False
        self.engine_error: ImcnetError | None = None

    @property
    def told_to_stop(self) -> bool:
        return self._shutdown_requested_date is not None

    # -- a live engine before each job -------------------------------------------------------------------

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        self._ensure_engine()  # after a job that killed it, before waiting for the next one
        return super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)

    def execute_job(self, job: RqJob, queue: Queue) -> None:
        self._ensure_engine()
        tasks.workplace = tasks.Workplace(
            settings=self._settings,
            storage=self._storage,
            queue=self._job_queue,
            engine_socket=self._engine.socket,
            engine_pid=self._engine.pid,
            model=self._engine.ready.model,
        )
        super().execute_job(job, queue)

    def _ensure_engine(self) -> None:
        try:
            self._engine.ensure_running()
        except ImcnetError as error:
            self.engine_error = error
            raise StopRequested from error  # anything else RQ would log with a traceback and forget

    # -- leases ------------------------------------------------------------------------------------------

    def clean_registries(self) -> None:
        """As RQ does it, under a lock of seconds: RQ's outlives a killed worker by a quarter of an hour."""
        if self.connection.set("imcnet:maintenance", self.name, nx=True, ex=_MAINTENANCE_SECONDS):
            for queue in self.queues:
                clean_registries(queue, self._exc_handlers)
                worker_registration.clean_worker_registry(queue)
                queue.intermediate_queue.cleanup(self, queue)
        self.last_cleaned_at = now()  # type: ignore[assignment] # RQ declares it as None

    def get_heartbeat_ttl(self, job: RqJob, working_time: float = 0.0) -> int:
        return self._settings.lease_seconds

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        super().heartbeat(timeout, pipeline)
        with suppress(QueueUnavailable):
            self._job_queue.announce(self._info(), lease_seconds=self._settings.lease_seconds)

    def maintain_heartbeats(self, job: RqJob, execution: Execution) -> None:
        try:
            super().maintain_heartbeats(job, execution)
        except RedisError as error:
            # RQ would end the worker, and with it a job that needs no Redis to finish.
            logger.warning("No heartbeat: Redis does not answer (%s)", type(error).__name__)

    # -- stopping ----------------------------------------------------------------------------------------

    def handle_warm_shutdown_request(self) -> None:
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, signal.SIGTERM)

    def fork_work_horse(self, job: RqJob, queue: Queue) -> None:
        super().fork_work_horse(job, queue)
        if self.told_to_stop:  # meanwhile: there was no horse to tell yet
            self.handle_warm_shutdown_request()

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()
        die_with_parent(self.pid)  # without its worker nobody would renew its lease
        signal.signal(signal.SIGTERM, _give_the_job_back)
        if self.told_to_stop:  # before the fork, or since then, when the worker's handler was still in place
            tasks.preempted.set()

    def teardown(self) -> None:
        self._engine.stop()
        with suppress(QueueUnavailable, RedisError):  # what is not unregistered expires
            self._job_queue.renounce(self.name)
            super().teardown()

    # -- jobs that RQ gives up ---------------------------------------------------------------------------

    def handle_job_failure(self, job: RqJob, queue: Queue, *args: Any, **kwargs: Any) -> None:
        """Where no attempt is left, the job gets its outcome; the task itself may have left a better one."""
        no_attempt_left = not job.should_retry
        super().handle_job_failure(job, queue, *args, **kwargs)
        if no_attempt_left:
            state = None
            with suppress(QueueUnavailable):
                state = self._job_queue.state(job.id)
            self._storage.conclude(job.id, given_up(state), keep_source=self._settings.keep_originals)

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


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _give_the_job_back(signum: int, frame: FrameType | None) -> None:
    tasks.preempted.set()
