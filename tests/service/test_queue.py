"""The queue on a real Redis, and what the project relies on of RQ."""

import time
from pathlib import Path

import pytest
from redis import Redis
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from service.broker import connect
from service.errors import QueueFull, QueueUnavailable
from service.jobs import Attempt, AttemptRecord, ModelInfo, Progress, WorkerInfo, utc_now
from service.queue import TASK, JobQueue
from service.storage import new_job_id


@pytest.fixture
def queue(redis: Redis) -> JobQueue:
    return JobQueue(redis, lease_seconds=1, max_queued_jobs=2)


def waiting_deliveries(redis: Redis) -> list[str]:
    names = redis.lrange("rq:queue:imcnet", 0, -1)
    assert isinstance(names, list)
    return [name.decode() for name in names]


def taken(redis: Redis) -> str:
    """A delivery that a worker has taken out of the queue, as RQ does it."""
    delivery = redis.lmove("rq:queue:imcnet", "rq:queue:imcnet:intermediate", "LEFT", "RIGHT")
    assert isinstance(delivery, bytes)
    return delivery.decode()


def attempt(delivery: str, number: int = 1) -> Attempt:
    record = AttemptRecord(delivery=delivery, worker="w", started_at=utc_now())
    return Attempt(number=number, end=None, directory=Path("x"), record=record)


def test_a_delivered_job_waits_at_its_position(queue: JobQueue) -> None:
    first, second = new_job_id(), new_job_id()
    queue.deliver(first)
    queue.deliver(second)
    state = queue.state(second)
    assert (state.leased, state.position, state.workers_alive) == (False, 2, 0)


def test_delivering_twice_queues_once(queue: JobQueue, redis: Redis) -> None:
    job_id = new_job_id()
    assert queue.deliver(job_id)
    assert not queue.deliver(job_id)
    assert len(waiting_deliveries(redis)) == 1


def test_a_job_on_its_way_to_a_worker_is_not_delivered_again(queue: JobQueue, redis: Redis) -> None:
    job_id = new_job_id()
    queue.deliver(job_id)
    taken(redis)
    assert not queue.deliver(job_id)


def test_a_job_handed_on_goes_to_the_front(queue: JobQueue) -> None:
    first, second = new_job_id(), new_job_id()
    queue.deliver(first)
    queue.deliver(second, at_front=True)
    assert queue.state(second).position == 1


def test_rq_gets_nothing_but_the_task_and_the_id_as_json(queue: JobQueue, redis: Redis) -> None:
    job_id = new_job_id()
    queue.deliver(job_id)
    (delivery,) = waiting_deliveries(redis)
    queued = RqJob.fetch(delivery, connection=redis, serializer=JSONSerializer)
    assert delivery.startswith(job_id)
    assert (queued.func_name, tuple(queued.args), queued.kwargs) == (TASK, (job_id,), {})
    assert (queued.timeout, queued.result_ttl, queued.failure_ttl, queued.retries_left) == (
        7200,
        60,
        60,
        None,
    )


def test_an_unknown_job_has_no_place(queue: JobQueue) -> None:
    state = queue.state(new_job_id())
    assert (state.leased, state.position) == (False, None)


def test_a_full_queue_is_refused(queue: JobQueue) -> None:
    queue.check_room()
    queue.deliver(new_job_id())
    queue.deliver(new_job_id())
    with pytest.raises(QueueFull):
        queue.check_room()


def test_progress_is_told_and_starts_over_with_the_next_attempt(queue: JobQueue, redis: Redis) -> None:
    job_id = new_job_id()
    queue.deliver(job_id)
    queue.begun(job_id, attempt(taken(redis)))
    queue.report(job_id, Progress(phase="segmenting", frames_done=3, frames_total=9, fps=1.5))
    state = queue.state(job_id)
    assert (state.leased, state.progress.frames_done) == (True, 3)
    queue.begun(job_id, attempt("another", 2))
    assert queue.state(job_id).progress.frames_done == 0


def test_a_lease_runs_out_unless_it_is_renewed(queue: JobQueue) -> None:
    job_id = new_job_id()
    queue.begun(job_id, attempt("d"))
    for _ in range(3):
        time.sleep(0.5)
        queue.renew(job_id, "d", "w")
    assert queue.is_leased("d")
    time.sleep(1.2)
    assert not queue.is_leased("d")
    queue.renew(job_id, "d", "w")
    assert queue.is_leased("d")


def test_a_forgotten_job_leaves_no_key(queue: JobQueue, redis: Redis) -> None:
    waits, was_taken, ran = new_job_id(), new_job_id(), new_job_id()
    queue.deliver(ran)
    queue.begun(ran, attempt(ran_by := taken(redis)))
    queue.report(ran, Progress())
    redis.zadd("rq:wip:imcnet", {f"{ran_by}:of-a-worker-that-died": time.time() + 60})
    redis.zadd(f"rq:executions:{ran_by}", {"of-a-worker-that-died": time.time() + 60})
    queue.discard(ran_by)
    queue.deliver(was_taken)
    taken(redis)
    queue.deliver(waits)
    for job_id in (waits, was_taken, ran):
        queue.forget(job_id)
        assert [key for key in redis.scan_iter() if job_id.encode() in key] == []
    assert waiting_deliveries(redis) == []
    assert redis.llen("rq:queue:imcnet:intermediate") == 0
    assert redis.zcard("rq:wip:imcnet") == 0


def test_a_job_that_a_worker_is_at_is_forgotten_but_for_its_lease(queue: JobQueue, redis: Redis) -> None:
    job_id = new_job_id()
    queue.deliver(job_id)
    delivery = taken(redis)
    queue.begun(job_id, attempt(delivery))
    queue.forget(job_id)
    assert queue.state(job_id).leased
    queue.discard(delivery)
    queue.forget(job_id)
    assert list(queue.known_jobs()) == []


def test_a_job_is_lost_where_nothing_is_known_of_it(queue: JobQueue) -> None:
    assert queue.has_lost(new_job_id())


def test_a_waiting_job_is_not_lost(queue: JobQueue) -> None:
    job_id = new_job_id()
    queue.deliver(job_id)
    assert not queue.has_lost(job_id)


def test_a_delivery_that_left_the_queue_is_lost_once_it_stays_away(queue: JobQueue, redis: Redis) -> None:
    job_id = new_job_id()
    queue.deliver(job_id)
    taken(redis)
    assert not queue.has_lost(job_id)
    assert not queue.has_lost(job_id)
    redis.expire(f"imcnet:stray:{job_id}", 50)  # ten seconds later
    assert queue.has_lost(job_id)
    assert queue.deliver(job_id)
    assert not queue.has_lost(job_id)


def test_all_together_have_one_turn_an_interval(queue: JobQueue) -> None:
    assert queue.claim_pass(interval_seconds=0.5)
    assert not queue.claim_pass(interval_seconds=0.5)
    time.sleep(0.5)
    assert queue.claim_pass(interval_seconds=0.5)


def test_after_a_gap_workers_get_a_lease_of_time_to_settle(queue: JobQueue) -> None:
    assert queue.is_settling()  # nobody has looked before: Redis may just be back
    deadline = time.monotonic() + 1.2
    while time.monotonic() < deadline:
        settling = queue.is_settling()
        time.sleep(0.1)
    assert not settling
    time.sleep(0.6)  # more than half a lease without anybody
    assert queue.is_settling()


def test_a_queue_tells_which_storage_its_jobs_are_in(queue: JobQueue) -> None:
    assert queue.storage() is None
    queue.serve("here")
    assert queue.storage() == "here"


def test_progress_expires_by_itself(queue: JobQueue, redis: Redis) -> None:
    job_id = new_job_id()
    queue.report(job_id, Progress(phase="segmenting"))
    assert isinstance(ttl := redis.ttl(f"imcnet:progress:{job_id}"), int)
    assert ttl > 0


def test_a_worker_counts_as_alive_until_its_lease_ends(queue: JobQueue, redis: Redis) -> None:
    model = ModelInfo(name="m", backbone="resnet18", weights_sha256="0" * 64, trained=False)
    worker = WorkerInfo(name="w", host="h", device="cpu", engine_pid=1, load_s=0.1, model=model)
    redis.sadd("rq:workers:imcnet", "rq:worker:w")  # RQ's own registration
    queue.announce(worker)
    assert queue.workers() == (worker,)
    time.sleep(1.2)
    assert queue.workers() == ()
    queue.announce(worker)
    queue.renounce("w")
    assert queue.workers() == ()


def test_an_unreachable_redis_is_said_at_once() -> None:
    queue = JobQueue(connect("redis://127.0.0.1:1/0", timeout_seconds=0.5))
    for call in (queue.ping, queue.check_room, queue.workers, lambda: queue.state(new_job_id())):
        with pytest.raises(QueueUnavailable):
            call()
