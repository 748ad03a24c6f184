"""What `imcnet doctor` looks at in Redis: the server, the queue against the storage, and the workers."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime

from service.cli.disk_checks import named
from service.cli.examination import Check, Finding, Patient, fail, ok, warn
from service.cli.job_report import age
from service.cli.serve import check_redis
from service.errors import JobGone, JobNotFound, Misconfigured, QueueUnavailable
from service.jobs import Attempt, utc_now
from service.settings import MIB

_PINGS = 5
_SLOW_PING_MS = 50
_OLDEST_REDIS = (6, 2)
_FULL_FRACTION = 0.8
_OLD_SECONDS = 1800
_SECOND_LOOK_SECONDS = 3  # a job on its way from the queue to a worker is nowhere for a moment


def server(patient: Patient) -> Finding:
    settings = patient.settings
    try:
        check_redis(settings.require_redis_url(), timeout_seconds=settings.redis_timeout_seconds)
    except (Misconfigured, QueueUnavailable) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return fail(f"{error.detail}{cause}", "Start it, or set IMCNET_REDIS_URL. No job is lost by it.")
    durations_ms = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        patient.redis.ping()
        durations_ms.append(1000 * (time.perf_counter() - began))
    message = f"Answers in {(median_ms := statistics.median(durations_ms)):.1f} ms"
    if median_ms > _SLOW_PING_MS:
        return warn(message, "Is it far away, swapping, or busy with something else?")
    return ok(message)


def version(patient: Patient) -> Finding:
    text = str(patient.redis_info["redis_version"])
    if tuple(int(part) for part in text.split(".")[:2]) < _OLDEST_REDIS:
        return fail(f"Redis {text}", f"Take {'.'.join(map(str, _OLDEST_REDIS))} or newer, or a Valkey.")
    return ok(f"Redis {text}")


def persistence(patient: Patient) -> Finding:
    info = patient.redis_info
    if not info["aof_enabled"]:
        return warn(
            "There is no append-only file",
            "Set `appendonly yes`: else the order of the queue and progress are lost with Redis.",
        )
    if info.get("aof_last_write_status", "ok") != "ok":
        return fail("The append-only file cannot be written", "Free the disk of Redis; see its log.")
    return ok("Append-only file")


def memory(patient: Patient) -> Finding:
    info = patient.redis_info
    used, most, policy = info["used_memory"], info["maxmemory"], info["maxmemory_policy"]
    if not most:
        return ok(f"{used / MIB:.1f} MiB, no limit")
    message = f"{used / MIB:.1f} of {most / MIB:.1f} MiB, {policy}"
    if policy != "noeviction":
        return fail(
            message, "Set `maxmemory-policy noeviction`: else Redis drops leases and jobs as it likes."
        )
    if used > _FULL_FRACTION * most:
        return warn(message, "Raise maxmemory, or see what else lives there: once full, nothing is queued.")
    return ok(message)


def clock(patient: Patient) -> Finding:
    seconds, microseconds = patient.redis.time()
    ahead = seconds + microseconds / 1e6 - time.time()
    return ok(
        f"That of Redis is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}; nothing depends on it"
    )


def identity(patient: Patient) -> Finding:
    known = patient.queue.storage()
    if known is None:
        return warn(
            "Redis does not know its data directory", "Start the API, which says it every few seconds."
        )
    if known != patient.storage.identity:
        return fail(
            f"The jobs of this Redis are not in {patient.settings.data_dir}",
            "Two data directories share a Redis, or IMCNET_DATA_DIR or IMCNET_REDIS_URL is another's.",
        )
    return ok("The jobs of this Redis are in this data directory")


def length(patient: Patient) -> Finding:
    waiting, limit = patient.queue.waiting(), patient.settings.max_queued_jobs
    message = f"{waiting} jobs wait, {limit} may"
    if waiting >= _FULL_FRACTION * limit:
        return warn(
            message, "Start more workers, or raise IMCNET_MAX_QUEUED_JOBS: beyond it uploads get a 503."
        )
    return ok(message)


def oldest(patient: Patient) -> Finding:
    since = [waiting_since for _, attempts, waiting_since in _unfinished(patient) if not _alive(attempts)]
    if not since:
        return ok("Nobody waits")
    message = f"The oldest job has waited for {age(min(since))}"
    if (utc_now() - min(since)).total_seconds() > _OLD_SECONDS:
        return warn(message, "Start more workers; see `imcnet jobs list` for who has posted so much.")
    return ok(message)


def stuck(patient: Patient) -> Finding:
    """Jobs that nobody would ever come to: neither in the queue, nor at a worker."""

    def nowhere() -> Iterator[str]:
        for job_id, attempts, _ in _unfinished(patient):
            state = patient.queue.state(job_id)
            if not _alive(attempts) and state.position is None and not state.leased:
                yield job_id

    if found := _seen_twice(nowhere):
        return fail(
            f"{len(found)} jobs wait, but not in the queue: {named(found)}",
            "APIs and idle workers mend it within a minute: does one run? By hand: `imcnet jobs requeue`.",
        )
    return ok("Every job that waits is in the queue")


def leases(patient: Patient) -> Finding:
    """Attempts whose worker has not been heard of."""
    running: list[str] = []

    def silent() -> Iterator[str]:
        running.clear()
        for job_id, attempts, _ in _unfinished(patient):
            if attempt := _alive(attempts):
                running.append(job_id)
                if not patient.queue.is_leased(attempt.record.delivery):
                    yield job_id

    if found := _seen_twice(silent):
        return warn(
            f"{len(found)} of {len(running)} running jobs have no lease: {named(found)}",
            "Its worker is dead or silent. APIs and idle workers mend it within a minute: does one run?",
        )
    return ok(f"{len(running)} running jobs have one each")


def strays(patient: Patient) -> Finding:
    there = set(patient.storage.job_ids())
    if found := sorted(set(patient.queue.known_jobs()) - there - set(patient.storage.job_ids())):
        return warn(
            f"Redis has keys of {len(found)} jobs that do not exist: {named(found)}",
            "The API's sweep removes them: is one running, and on this data directory?",
        )
    return ok("All are those of jobs that exist")


def workers(patient: Patient) -> Finding:
    alive = patient.queue.workers()
    if not alive:
        return fail(
            "No worker is alive, so jobs wait", "Start one (`imcnet worker`), or see the log of those."
        )
    names = sorted({f"{worker.model.name} on {worker.device}" for worker in alive})
    message = f"{len(alive)} alive: {', '.join(names)}"
    if len({worker.model for worker in alive}) > 1:
        return warn(
            message, "They have different weights, so masks depend on who makes them: give all the same."
        )
    if not all(worker.model.trained for worker in alive):
        return warn(message, "The weights are untrained, so masks mean nothing: set IMCNET_WEIGHTS.")
    return ok(message)


def _unfinished(patient: Patient) -> Iterator[tuple[str, list[Attempt], datetime]]:
    """The readable jobs without an outcome, their attempts, and since when they have waited or run."""
    storage = patient.storage
    for job_id in storage.unfinished():
        with suppress(
            JobNotFound, JobGone, ValueError
        ):  # deleted meanwhile; damaged, which is told elsewhere
            attempts = storage.attempts(job_id)
            since = attempts[-1].record.started_at if attempts else storage.load(job_id).created_at
            if not storage.has_ended(job_id):  # which takes the attempts away
                yield job_id, attempts, since


def _alive(attempts: list[Attempt]) -> Attempt | None:
    return attempts[-1] if attempts and attempts[-1].end is None else None


def _seen_twice(look: Callable[[], Iterator[str]]) -> list[str]:
    """What is still so after a while."""
    if not (first := set(look())):
        return []
    time.sleep(_SECOND_LOOK_SECONDS)
    return [job_id for job_id in look() if job_id in first]


_REDIS, _BOTH = ("redis",), ("data directory", "redis")

CHECKS = (
    Check(name="redis", look=server, needs=("settings",)),
    Check(name="redis version", look=version, needs=_REDIS),
    Check(name="redis persistence", look=persistence, needs=_REDIS),
    Check(name="redis memory", look=memory, needs=_REDIS),
    Check(name="redis clock", look=clock, needs=_REDIS),
    Check(name="identity", look=identity, needs=_BOTH),
    Check(name="queue length", look=length, needs=_REDIS),
    Check(name="waiting", look=oldest, needs=("data directory",)),
    Check(name="stuck jobs", look=stuck, needs=(*_BOTH, "identity")),
    Check(name="leases", look=leases, needs=(*_BOTH, "identity")),
    Check(name="keys", look=strays, needs=(*_BOTH, "identity")),
    Check(name="workers", look=workers, needs=_REDIS),
)
