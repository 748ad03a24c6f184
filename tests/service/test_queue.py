"""The queue on a real Redis, and what the project relies on of RQ."""

import time

import pytest
from redis import Redis
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from service.errors import QueueFull, QueueUnavailable
from service.jobs import JobRecord, ModelInfo, Progress, WorkerInfo
from service.queue import TASK, JobQueue, connect
from service.storage import new_job_id
from tests.service.test_jobs import RECORD


@pytest.fixture
def queue(redis: Redis) -> JobQueue:
    return JobQueue(redis, max_attempts=3, max_queued_jobs=2)


def record() -> JobRecord:
    return RECORD.model_copy(update={"id": new_job_id()})


def test_a_submitted_job_waits_at_its_position(queue: JobQueue) -> None:
    first, second = record(), record()
    queue.submit(first)
    queue.submit(second)
    state = queue.state(second.id)
    assert state is not None
    assert (state.running, state.position, state.attempt, state.workers_alive) == (False, 2, 0, 0)


def test_submitting_twice_queues_once(queue: JobQueue, redis: Redis) -> None:
    job = record()
    queue.submit(job)
    queue.submit(job)
    assert redis.llen("rq:queue:imcnet") == 1


def test_rq_gets_nothing_but_the_task_and_the_id_as_json(queue: JobQueue, redis: Redis) -> None:
    job = record()
    queue.submit(job)
    queued = RqJob.fetch(job.id, connection=redis, serializer=JSONSerializer)
    assert (queued.func_name, tuple(queued.args), queued.kwargs) == (TASK, (job.id,), {})
    assert (queued.timeout, queued.result_ttl, queued.retries_left) == (7200, 60, 2)


def test_an_unknown_job_has_no_state(queue: JobQueue) -> None:
    assert queue.state(new_job_id()) is None


def test_a_full_queue_is_refused(queue: JobQueue) -> None:
    queue.check_room()
    queue.submit(record())
    queue.submit(record())
    with pytest.raises(QueueFull):
        queue.check_room()


def test_attempts_are_counted_and_progress_is_told(queue: JobQueue) -> None:
    job = record()
    queue.submit(job)
    assert queue.begin_attempt(job.id) == 1
    queue.report(job.id, Progress(phase="segmenting", frames_done=3, frames_total=9, fps=1.5))
    state = queue.state(job.id)
    assert state is not None
    assert state.progress.frames_done == 3
    assert state.started_at is not None
    assert queue.begin_attempt(job.id) == 2
    state = queue.state(job.id)
    assert state is not None
    assert (state.attempt, state.progress.frames_done) == (2, 0)


def test_a_forgotten_job_leaves_no_key(queue: JobQueue, redis: Redis) -> None:
    job = record()
    queue.submit(job)
    queue.begin_attempt(job.id)
    queue.forget(job.id)
    assert queue.state(job.id) is None
    assert {key for key in redis.scan_iter() if job.id.encode() in key} == set()


def test_a_job_whose_execution_has_expired_can_be_forgotten(queue: JobQueue, redis: Redis) -> None:
    job = record()
    queue.submit(job)
    redis.zadd(f"rq:executions:{job.id}", {"of-a-worker-that-died": time.time() + 60})
    queue.forget(job.id)
    assert queue.state(job.id) is None


def test_progress_expires_by_itself(queue: JobQueue, redis: Redis) -> None:
    job_id = new_job_id()
    queue.report(job_id, Progress(phase="segmenting"))
    assert redis.ttl(f"imcnet:progress:{job_id}") > 0


def test_a_worker_counts_as_alive_until_its_lease_ends(queue: JobQueue, redis: Redis) -> None:
    model = ModelInfo(name="m", backbone="resnet18", weights_sha256="0" * 64, trained=False)
    worker = WorkerInfo(name="w", host="h", device="cpu", engine_pid=1, load_s=0.1, model=model)
    redis.sadd("rq:workers:imcnet", "rq:worker:w")  # RQ's own registration
    queue.announce(worker, lease_seconds=1)
    assert queue.workers() == (worker,)
    time.sleep(1.2)
    assert queue.workers() == ()
    queue.announce(worker, lease_seconds=60)
    queue.renounce("w")
    assert queue.workers() == ()


def test_an_unreachable_redis_is_said_at_once() -> None:
    queue = JobQueue(connect("redis://127.0.0.1:1/0", timeout_seconds=0.5))
    for call in (queue.ping, queue.check_room, queue.workers, lambda: queue.state(new_job_id())):
        with pytest.raises(QueueUnavailable):
            call()
