from datetime import timedelta

import pytest
from redis import Redis
from rq import Queue
from rq.job import JobStatus as RqStatus
from rq.serializers import JSONSerializer

from service.jobs import JobRecord, JobStatus, Outcome, utc_now
from service.queue import JobQueue, connect
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
    assert storage.settled(old.id)


def test_jobs_that_the_queue_has_lost_are_queued_once(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record = accepted(storage)
    for _ in range(3):
        sweep(storage, queue, SETTINGS)
    assert redis.lrange("rq:queue:imcnet", 0, -1) == [record.id.encode()]


def test_a_job_that_the_queue_has_given_up_gets_its_outcome(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record = accepted(storage)
    queue.submit(record)
    job = Queue("imcnet", connection=redis, serializer=JSONSerializer).fetch_job(record.id)
    assert job is not None
    job.set_status(RqStatus.FAILED)
    sweep(storage, queue, SETTINGS)
    outcome = storage.outcome(record.id)
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.code == "worker_crashed"
    assert queue.state(record.id) is None


def test_without_redis_jobs_expire_all_the_same(storage: JobStorage) -> None:
    unreachable = JobQueue(connect("redis://127.0.0.1:1/0", timeout_seconds=0.5))
    waiting = accepted(storage)
    ended(storage, hours_ago=2)
    sweep(storage, unreachable, SETTINGS)
    assert list(storage.job_ids()) == [waiting.id]
