"""What is measured, for Prometheus.

Each application has a registry of its own: what its process has answered is counted in it, and where jobs,
workers, Redis and disk stand is looked up at every scrape. What all processes count together is in
``service.tally``.
"""

import json
import logging
import shutil
import time
from collections import Counter as Multiset
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    PROBLEMS,
    JobGone,
    JobNotFound,
    QueueUnavailable,
    StorageFull,
    StorageUnavailable,
)
from service.jobs import WorkerInfo, utc_now
from service.queue import JobQueue
from service.storage import JobStorage
from service.tally import FAMILIES, Tally

logger = logging.getLogger(__name__)

_DISK_ERRORS = (OSError, StorageFull, StorageUnavailable)
_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_METHODS = ("GET", "HEAD", "POST", "DELETE")
_OTHER = "other"  # whatever a client makes up is one label


@dataclass(frozen=True, kw_only=True)
class StorageSnapshot:
    """The jobs without an outcome, and the disk. Ages are in seconds, 0 where there is no such job.

    ``running`` jobs have an attempt that lives, ``waiting`` ones have none; these have waited since they were
    accepted, or since their last attempt began. What is stored of ``unreadable`` ones makes no sense.
    """

    writable: bool
    waiting: int
    oldest_waiting_s: float
    running: tuple[str, ...]
    oldest_attempt_s: float
    unreadable: int
    disk_free_bytes: int
    disk_total_bytes: int


@dataclass(frozen=True, kw_only=True)
class QueueSnapshot:
    """What Redis knows. ``leases`` and ``frames_per_second`` are those of the running jobs."""

    deliveries: int
    leases: int
    frames_per_second: float
    workers: tuple[WorkerInfo, ...]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The service at one moment. None: it could not be asked."""

    storage: StorageSnapshot | None
    queue: QueueSnapshot | None


def take_snapshot(storage: JobStorage, queue: JobQueue) -> Snapshot:
    """Where jobs, workers, Redis and disk stand. Where one of them is down, that is told too."""
    of_storage, of_queue = None, None
    try:
        of_storage = _look_at_storage(storage)
    except _DISK_ERRORS as error:
        logger.warning("The storage cannot be read: %s", error)
    try:
        of_queue = _look_at_queue(queue, of_storage.running if of_storage else ())
    except QueueUnavailable as error:
        logger.warning("%s", error.detail)
    return Snapshot(storage=of_storage, queue=of_queue)


def _look_at_storage(storage: JobStorage) -> StorageSnapshot:
    """Raises: OSError, StorageUnavailable: Its directories cannot be read."""
    disk = shutil.disk_usage(storage.root)
    waiting, running, unreadable = [], {}, 0
    for job_id in storage.unfinished():
        try:
            attempts = storage.attempts(job_id)
            since = attempts[-1].record.started_at if attempts else storage.load(job_id).created_at
        except (JobNotFound, JobGone):
            continue  # deleted meanwhile
        except ValueError:
            unreadable += 1
            continue
        age_s = max(0.0, (utc_now() - since).total_seconds())
        if attempts and attempts[-1].end is None:
            running[job_id] = age_s
        elif not storage.has_ended(job_id):  # which takes the attempts away
            waiting.append(age_s)
    return StorageSnapshot(
        writable=_is_writable(storage),
        waiting=len(waiting),
        oldest_waiting_s=max(waiting, default=0.0),
        running=tuple(running),
        oldest_attempt_s=max(running.values(), default=0.0),
        unreadable=unreadable,
        disk_free_bytes=disk.free,
        disk_total_bytes=disk.total,
    )


def _is_writable(storage: JobStorage) -> bool:
    try:
        storage.check_writable()
    except _DISK_ERRORS:
        return False
    return True


def _look_at_queue(queue: JobQueue, running: tuple[str, ...]) -> QueueSnapshot:
    """Raises: QueueUnavailable: Redis cannot be reached, which takes no longer than one answer may take."""
    deliveries, workers = queue.waiting(), queue.workers()
    leased = [state for state in map(queue.state, running) if state.leased]
    return QueueSnapshot(
        deliveries=deliveries,
        leases=len(leased),
        frames_per_second=sum(state.progress.fps or 0.0 for state in leased),
        workers=workers,
    )


class Metrics:
    """The metrics of one application."""

    def __init__(self, storage: JobStorage, queue: JobQueue, tally: Tally) -> None:
        # For the whole process: else every counter is joined by a gauge of when it was made.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        build = Info("imcnet_build", "This release.", registry=self._registry)
        build.info({"version": version("imcnet")})
        self.requests = Counter(
            "imcnet_http_requests",
            "Requests answered.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "imcnet_http_request_duration_seconds",
            "From the head of a request to the end of its answer.",
            ("route", "method"),
            buckets=_BUCKETS_SECONDS,
            registry=self._registry,
        )
        self.received_bytes = Counter(
            "imcnet_http_received_bytes", "Bytes of request bodies received.", registry=self._registry
        )
        self.problems = Counter(
            "imcnet_problems",
            "Requests answered with a problem, by its code.",
            ("code",),
            registry=self._registry,
        )
        for code, (status, _) in PROBLEMS.items():  # from zero, so that the first is seen as an increase
            if status is not None:
                self.problems.labels(code)
        self._registry.register(_AtScrape(storage, queue, tally))

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format. Blocks while storage and Redis are asked."""
        return generate_latest(self._registry)


class RequestMetrics:
    """ASGI middleware that measures what is answered, by the route's template."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, is_problem = 500, False  # an error that nobody knows is answered further out

        async def receive_counted() -> Message:
            message = await receive()
            self._metrics.received_bytes.inc(len(message.get("body", b"")))
            return message

        async def send_noted(message: Message) -> None:
            nonlocal status, is_problem
            if message["type"] == "http.response.start":
                status = message["status"]
                is_problem = (b"content-type", b"application/problem+json") in message["headers"]
            elif is_problem:
                self._metrics.problems.labels(json.loads(message["body"])["code"]).inc()
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive_counted, send_noted)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else _OTHER
            route = getattr(scope.get("route"), "path", _OTHER)
            self._metrics.requests.labels(route, method, str(status)).inc()
            self._metrics.request_seconds.labels(route, method).observe(time.perf_counter() - began)


class _AtScrape(Collector):
    """What is looked up whenever Prometheus asks. What is not known then is left out."""

    def __init__(self, storage: JobStorage, queue: JobQueue, tally: Tally) -> None:
        self._storage = storage
        self._queue = queue
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        snapshot = take_snapshot(self._storage, self._queue)
        yield _gauge("storage_up", "1 if files can be written.", _storage_up(snapshot))
        yield _gauge("redis_up", "1 if Redis answers.", snapshot.queue is not None)
        if snapshot.storage is not None:
            yield from _storage_gauges(snapshot.storage)
        if snapshot.queue is not None:  # else nothing more is asked: a Redis that hangs has cost its time
            yield from _queue_gauges(snapshot.queue)
            try:
                counts = self._tally.read()
            except QueueUnavailable:
                return
            yield from _counters(counts)


def _storage_up(snapshot: Snapshot) -> bool:
    return snapshot.storage is not None and snapshot.storage.writable


def _storage_gauges(storage: StorageSnapshot) -> Iterator[Metric]:
    yield _gauge("jobs_waiting", "Accepted jobs that no worker is at.", storage.waiting)
    yield _gauge("oldest_waiting_job_seconds", "Age of the one that waits longest.", storage.oldest_waiting_s)
    yield _gauge("jobs_running", "Jobs with an attempt under way.", len(storage.running))
    yield _gauge("oldest_attempt_seconds", "Age of the oldest attempt under way.", storage.oldest_attempt_s)
    yield _gauge("jobs_unreadable", "Jobs whose files make no sense.", storage.unreadable)
    yield _gauge("disk_free_bytes", "Free space on the disk of the data.", storage.disk_free_bytes)
    yield _gauge("disk_total_bytes", "Size of the disk of the data.", storage.disk_total_bytes)


def _queue_gauges(queue: QueueSnapshot) -> Iterator[Metric]:
    yield _gauge("queue_length", "Deliveries of jobs in the queue.", queue.deliveries)
    yield _gauge("leases", "Running jobs whose lease is live.", queue.leases)
    yield _gauge("frames_per_second", "Frames segmented a second, over all workers.", queue.frames_per_second)
    workers = GaugeMetricFamily("imcnet_workers", "Workers alive, by device.", labels=("device",))
    for device, count in sorted(Multiset(worker.device for worker in queue.workers).items()):
        workers.add_metric((device,), count)
    yield workers


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(f"imcnet_{name}", help_, value=value)


def _counters(counts: dict[str, float]) -> Iterator[Metric]:
    """What the tally holds of the families that this release knows."""
    for family in FAMILIES:
        values = dict.fromkeys(family.values, 0.0)
        for key, count in counts.items():
            name, *labels = key.split(":")
            if name == family.name and len(labels) == len(family.labels):
                values[tuple(labels)] = count
        metric = CounterMetricFamily(f"imcnet_{family.name}", family.help, labels=family.labels)
        for labels_of_one, count in values.items():
            metric.add_metric(labels_of_one, count)
        yield metric
