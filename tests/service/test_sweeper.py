from datetime import timedelta

import pytest
from redis import Redis

from service.broker import connect
from service.errors import QueueUnavailable
from service.jobs import JobRecord, JobStatus, Outcome, Progress, utc_now
from service.queue import JobQueue
from service.settings import ServiceSettings
from service.storage import JobStorage
from service.sweeper import sweep
from tests.service.test_storage import accepted

SETTINGS = ServiceSettings(retention_seconds=3600)


@pytest.fixture
def queue(redis: Redis) -> JobQueue:
    return JobQueue(redis)


def ended(storage: JobStorage, *, hours_ago: float) -> JobRecord:
    record = accepted(storage)
    finished_at = utc_now() - timedelta(hours=hours_ago)
    storage.conclude(record.id, Outcome(status=JobStatus.CANCELED, finished_at=finished_at))
    return record


def test_finished_jobs_expire_after_their_retention(storage: JobStorage, queue: JobQueue) -> None:
    old, young = ended(storage, hours_ago=2), ended(storage, hours_ago=0.5)
    sweep(storage, queue, SETTINGS)
    assert list(storage.job_ids()) == [young.id]
    assert storage.has_ended(old.id)


def test_what_redis_holds_of_jobs_that_are_over_is_removed(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    waiting, over, removed = accepted(storage), accepted(storage), accepted(storage)
    for record in (waiting, over, removed):
        queue.deliver(record.id)
        queue.report(record.id, Progress())
    storage.conclude(over.id, Outcome(status=JobStatus.CANCELED, finished_at=utc_now()))
    storage.remove(removed.id)
    sweep(storage, queue, SETTINGS)
    keys = b" ".join(redis.scan_iter())
    assert waiting.id.encode() in keys
    assert over.id.encode() not in keys
    assert removed.id.encode() not in keys
    assert queue.waiting() == 1


def test_without_redis_jobs_expire_all_the_same(storage: JobStorage) -> None:
    unreachable = JobQueue(connect("redis://127.0.0.1:1/0", timeout_seconds=0.5))
    waiting = accepted(storage)
    ended(storage, hours_ago=2)
    with pytest.raises(QueueUnavailable):
        sweep(storage, unreachable, SETTINGS)
    assert list(storage.job_ids()) == [waiting.id]
