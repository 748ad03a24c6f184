"""Whatever Redis and workers have lost, an accepted job gets its next attempt or its outcome."""

from pathlib import Path

import pytest
from redis import Redis

from service.broker import connect
from service.errors import QueueUnavailable
from service.jobs import Attempt, AttemptEnd, JobRecord
from service.queue import JobQueue
from service.reconciliation import Reconciliation
from service.storage import JobStorage
from tests.service.test_queue import taken, waiting_deliveries
from tests.service.test_storage import accepted, made


@pytest.fixture
def queue(redis: Redis) -> JobQueue:
    return JobQueue(redis, lease_seconds=30)


@pytest.fixture
def promises(storage: JobStorage, queue: JobQueue) -> Reconciliation:
    return Reconciliation(storage=storage, queue=queue, max_attempts=2, keep_source=False)


def reconcile(promises: Reconciliation, redis: Redis) -> None:
    """The next pass, with all workers having had their time to renew their leases."""
    redis.set("imcnet:watched", 1)
    redis.delete("imcnet:reconciling", "imcnet:settling")
    promises.run(interval_seconds=5)


def running(storage: JobStorage, queue: JobQueue, redis: Redis) -> tuple[JobRecord, Attempt]:
    """A job that a worker is at."""
    record = accepted(storage)
    queue.deliver(record.id)
    attempt = storage.begin(record.id, delivery=taken(redis), worker="w")
    queue.begun(record.id, attempt)
    redis.delete("rq:queue:imcnet:intermediate")  # as RQ does when the horse begins
    return record, attempt


def ends(storage: JobStorage, record: JobRecord) -> list[AttemptEnd | None]:
    return [attempt.end for attempt in storage.attempts(record.id)]


def test_a_job_that_was_never_queued_is_queued_once(
    promises: Reconciliation, storage: JobStorage, redis: Redis
) -> None:
    record = accepted(storage)
    for _ in range(3):
        reconcile(promises, redis)
    assert [delivery[:36] for delivery in waiting_deliveries(redis)] == [record.id]


def test_after_redis_was_emptied_waiting_jobs_are_queued_in_the_order_of_their_coming(
    promises: Reconciliation, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    records = [accepted(storage) for _ in range(5)]
    for record in records:
        queue.deliver(record.id)
    redis.flushall()
    reconcile(promises, redis)
    assert [delivery[:36] for delivery in waiting_deliveries(redis)] == sorted(r.id for r in records)


def test_a_job_whose_lease_holds_is_left_alone(
    promises: Reconciliation, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, _ = running(storage, queue, redis)
    reconcile(promises, redis)
    assert ends(storage, record) == [None]
    assert waiting_deliveries(redis) == []


def test_a_job_whose_lease_has_run_out_gets_its_next_attempt_at_the_front(
    promises: Reconciliation, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, attempt = running(storage, queue, redis)
    queue.deliver(accepted(storage).id)
    redis.delete(f"imcnet:lease:{attempt.record.delivery}")
    for _ in range(3):
        reconcile(promises, redis)
    assert ends(storage, record) == [AttemptEnd.LOST]
    assert waiting_deliveries(redis)[0][:36] == record.id
    assert len(waiting_deliveries(redis)) == 2
    assert not storage.lives(attempt)


def test_a_job_whose_attempts_are_used_up_fails_with_a_diagnosis(
    promises: Reconciliation, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, first = running(storage, queue, redis)
    promises.hand_on(record.id, first, AttemptEnd.CRASHED)
    second = storage.begin(record.id, delivery=taken(redis), worker="w")
    queue.begun(record.id, second)
    redis.delete(f"imcnet:lease:{second.record.delivery}")
    reconcile(promises, redis)
    outcome = storage.outcome(record.id)
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.code == "worker_crashed"
    assert "1: crashed, 2: lost" in outcome.error.detail
    assert [key for key in redis.scan_iter() if record.id.encode() in key] == []


def test_an_attempt_that_was_given_back_does_not_count(
    promises: Reconciliation, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, attempt = running(storage, queue, redis)
    for _ in range(5):
        promises.hand_on(record.id, attempt, AttemptEnd.PREEMPTED)
        assert storage.outcome(record.id) is None
        attempt = storage.begin(record.id, delivery=taken(redis), worker="w")
        queue.begun(record.id, attempt)
    assert attempt.number == 6


def test_just_after_redis_was_away_no_attempt_is_taken_for_lost(
    promises: Reconciliation, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, attempt = running(storage, queue, redis)
    redis.flushall()
    promises.run(interval_seconds=5)
    assert ends(storage, record) == [None]
    queue.renew(record.id, attempt.record.delivery, "w")  # the worker is back
    reconcile(promises, redis)
    assert ends(storage, record) == [None]
    assert waiting_deliveries(redis) == []


def test_of_an_attempt_that_two_declare_lost_one_successor_is_queued(
    promises: Reconciliation, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, attempt = running(storage, queue, redis)
    promises.hand_on(record.id, attempt, AttemptEnd.LOST)
    promises.hand_on(record.id, attempt, AttemptEnd.CRASHED)
    assert ends(storage, record) == [AttemptEnd.LOST]
    assert len(waiting_deliveries(redis)) == 1


def test_a_stale_attempt_neither_publishes_nor_disturbs_its_successor(
    promises: Reconciliation, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, stale = running(storage, queue, redis)
    success = made(stale, "masks.zip")
    promises.hand_on(record.id, stale, AttemptEnd.LOST)
    successor = storage.begin(record.id, delivery=taken(redis), worker="w")
    queue.begun(record.id, successor)
    assert not storage.publish(stale, success)
    queue.renew(record.id, stale.record.delivery, "zombie")
    queue.discard(stale.record.delivery)
    assert storage.lives(successor)
    assert queue.state(record.id).leased
    assert storage.publish(successor, made(successor, "masks.zip"))


def test_settled_and_deleted_jobs_are_left_alone(
    promises: Reconciliation, storage: JobStorage, redis: Redis
) -> None:
    removed, settled = accepted(storage), accepted(storage)
    storage.remove(removed.id)
    attempt = storage.begin(settled.id, delivery="d", worker="w")
    storage.publish(attempt, made(attempt))
    reconcile(promises, redis)
    assert waiting_deliveries(redis) == []


def test_two_do_not_reconcile_at_once(promises: Reconciliation, storage: JobStorage, redis: Redis) -> None:
    reconcile(promises, redis)
    accepted(storage)
    promises.run(interval_seconds=5)
    assert waiting_deliveries(redis) == []


def test_without_redis_nothing_happens_and_that_is_said(storage: JobStorage, tmp_path: Path) -> None:
    record = accepted(storage)
    attempt = storage.begin(record.id, delivery="d", worker="w")
    unreachable = JobQueue(connect(f"unix://{tmp_path}/none", timeout_seconds=0.5))
    promises = Reconciliation(storage=storage, queue=unreachable, max_attempts=2, keep_source=False)
    with pytest.raises(QueueUnavailable):
        promises.run(interval_seconds=5)
    assert storage.lives(attempt)
