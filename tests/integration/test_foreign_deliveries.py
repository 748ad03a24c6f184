"""Whoever can write to Redis cannot have a worker run anything but its own task."""

import os
import pickle
from pathlib import Path

import pytest
from redis import Redis
from rq import Callback, Queue
from rq.serializers import JSONSerializer, PickleSerializer

from service.queue import QUEUE_NAME, TASK
from service.storage import new_job_id
from tests.integration.conftest import Stack
from tests.videos import moving_square, write_video
from tests.waiting import wait_until

pytestmark = pytest.mark.processes


class Bomb:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> object:
        return os.system, (self.command,)


def test_a_worker_runs_its_own_task_and_nothing_else(stack: Stack, redis: Redis, tmp_path: Path) -> None:
    stack.start_api()
    trace = tmp_path / "trace"
    command = f"touch {trace}"
    queue = Queue(QUEUE_NAME, connection=redis, serializer=JSONSerializer)
    pickled = Queue(QUEUE_NAME, connection=redis, serializer=PickleSerializer)
    own = {"on_success": Callback("os.system"), "on_failure": Callback("os.system")}
    foreign = [
        queue.enqueue_call("os.system", args=(command,)),
        queue.enqueue_call("builtins.eval", args=(f"__import__('os').system({command!r})",)),
        queue.enqueue_call(TASK, args=(new_job_id(), command)),
        queue.enqueue_call(TASK, args=(new_job_id(),), kwargs={"command": command}),
        queue.enqueue_call(TASK, args=([command],)),
        queue.enqueue_call(TASK, args=(new_job_id(),), **own),
        pickled.enqueue_call(TASK, args=(Bomb(command),)),
    ]
    redis.hset(foreign[0].key, "data", pickle.dumps(Bomb(command)))
    stack.start_worker()
    job = stack.ended(stack.post(write_video(tmp_path / "clip.mp4", moving_square(3)))["id"])
    assert job["status"] == "succeeded"
    wait_until(lambda: not any(redis.exists(each.key) for each in foreign))
    assert not trace.exists()
    assert all(process.poll() is None for process in stack.processes)
