"""``/jobs/{id}/events``, from a real API. What workers do is done here, by the same queue and storage."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from redis import Redis

from service.broker import connect
from service.embedded import EmbeddedRedis
from service.events import BEGINNING, JobEvents
from service.jobs import Attempt, JobStatus, Outcome, Progress, utc_now
from service.processes import tethered
from service.queue import JobQueue
from service.storage import JobStorage, new_job_id
from tests.integration.conftest import Stack
from tests.integration.test_api import assert_problem, succeed
from tests.videos import moving_square, write_video
from tests.waiting import wait_until

pytestmark = pytest.mark.processes


class Told(NamedTuple):
    kind: str
    id: str | None
    data: dict[str, Any]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", moving_square(5))


@pytest.fixture
def job_id(stack: Stack, video: Path) -> str:
    stack.start_api()
    job_id: str = stack.post(video)["id"]
    return job_id


@contextmanager
def watching(stack: Stack, job_id: str, last_id: str | None = None) -> Iterator[Iterator[Told]]:
    """The events of a stream that has begun; they end where the stream does."""
    headers = {} if last_id is None else {"last-event-id": last_id}
    with stack.client as client, client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        yield events_in(answer.iter_lines())


def events_in(lines: Iterator[str]) -> Iterator[Told]:
    """As https://html.spec.whatwg.org/multipage/server-sent-events.html says, as far as it is used."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            yield Told(fields["event"], fields.get("id"), json.loads(fields["data"]))
            fields = {}


class Worker:
    """An attempt at a job, and what a worker says of it."""

    def __init__(self, stack: Stack, redis: Redis, job_id: str) -> None:
        self.queue = JobQueue(redis)
        self.storage = JobStorage(stack.data_dir)
        self.job_id = job_id
        self.attempt: Attempt | None = None

    def begin(self) -> None:
        self.attempt = self.storage.begin(self.job_id, delivery="delivery", worker="worker")
        self.queue.begun(self.job_id, self.attempt)

    def report(self, frames_done: int) -> None:
        progress = Progress(phase="segmenting", frames_done=frames_done, frames_total=1000, fps=2.0)
        self.queue.report(self.job_id, progress)

    def fail(self) -> None:
        assert self.attempt is not None
        outcome = Outcome(status=JobStatus.FAILED, attempt=1, finished_at=utc_now())
        assert self.storage.publish(self.attempt, outcome)


# -- from the beginning to the end -----------------------------------------------------------------------


def test_a_job_is_told_from_the_queue_to_its_end(stack: Stack, redis: Redis, job_id: str) -> None:
    worker = Worker(stack, redis, job_id)
    with watching(stack, job_id) as events:
        now = next(events)
        assert (now.kind, now.data["status"], now.data) == ("status", "queued", stack.job(job_id))
        worker.begin()
        running = next(events)
        assert (running.kind, running.data) == ("status", stack.job(job_id))
        assert (running.data["status"], running.data["attempt"]) == ("running", 1)
        worker.report(10)
        progress = next(events)
        assert (progress.kind, progress.data) == ("progress", stack.job(job_id)["progress"])
        assert (progress.data["percent"], progress.data["eta_s"]) == (1.0, 495.0)
        worker.fail()
        rest = list(events)
    assert [(told.kind, told.id, told.data) for told in rest] == [("end", "end", stack.job(job_id))]
    ids = [told.id for told in (now, running, progress)]
    assert ids == [event.id for event in JobEvents(redis).after(job_id, BEGINNING, count=10)]


def test_what_was_missed_is_told_to_whoever_comes_back(stack: Stack, redis: Redis, job_id: str) -> None:
    worker = Worker(stack, redis, job_id)
    with watching(stack, job_id) as events:
        last_id = next(events).id
    worker.begin()
    for frames in range(1, 4):
        worker.report(frames)
    with watching(stack, job_id, last_id) as events:
        missed = [next(events) for _ in range(3)]
    assert [told.kind for told in missed] == ["status", "progress", "progress"]
    assert [told.data["frames_done"] for told in missed[1:]] == [1, 2]
    worker.fail()
    with watching(stack, job_id, missed[-1].id) as events:
        rest = list(events)
    assert [told.kind for told in rest] == ["progress", "end"]
    assert rest[0].data["frames_done"] == 3


def test_a_status_that_is_told_late_is_told_as_it_was(stack: Stack, redis: Redis, job_id: str) -> None:
    worker = Worker(stack, redis, job_id)
    worker.begin()
    worker.fail()
    with watching(stack, job_id, BEGINNING) as events:
        told = list(events)
    assert [(event.kind, event.data["status"], event.data["attempt"]) for event in told] == [
        ("status", "queued", 0),
        ("status", "running", 1),
        ("end", "failed", 1),
    ]
    assert [event.data["finished_at"] is None for event in told] == [True, True, False]


def test_more_events_than_are_kept_cost_the_oldest_only(stack: Stack, redis: Redis, job_id: str) -> None:
    worker = Worker(stack, redis, job_id)
    for frames in range(2500):
        worker.report(frames)
    succeed(stack, job_id)
    with watching(stack, job_id, BEGINNING) as events:
        told = list(events)
    assert [event.data["frames_done"] for event in told[:-1]] == list(range(1500, 2500))
    assert told[-1].kind == "end"


@pytest.mark.parametrize("last_id", ["nonsense", "", "99999999999999999999-0"])
def test_an_id_that_is_none_counts_as_none(stack: Stack, job_id: str, last_id: str) -> None:
    with watching(stack, job_id, last_id) as events:
        assert next(events).kind == "status"


def test_a_canceled_job_is_told_to_be_canceling_while_a_worker_has_it(
    stack: Stack, redis: Redis, job_id: str
) -> None:
    worker = Worker(stack, redis, job_id)
    worker.begin()
    with watching(stack, job_id) as events, stack.client as client:
        assert next(events).data["status"] == "running"
        client.post(f"/jobs/{job_id}/cancel").raise_for_status()
        told = next(events)
        assert (told.kind, told.id, told.data["status"]) == ("status", None, "canceling")
        worker.queue.discard("delivery")
        assert [(event.kind, event.data["status"]) for event in events] == [("end", "canceled")]


def test_what_no_event_tells_is_told_after_a_while(stack: Stack, video: Path, job_id: str) -> None:
    second = stack.post(video)["id"]
    with watching(stack, second) as events, stack.client as client:
        assert next(events).data["queue_position"] == 2
        client.delete(f"/jobs/{job_id}").raise_for_status()
        assert next(events).data["queue_position"] == 1


# -- jobs that have ended, or are not there --------------------------------------------------------------


def test_of_a_job_that_has_ended_the_end_is_told_at_once(stack: Stack, job_id: str) -> None:
    succeed(stack, job_id)
    with watching(stack, job_id) as events:
        told = list(events)
    assert [event.kind for event in told] == ["status", "end"]
    assert told[0].data == told[1].data == stack.job(job_id)


def test_whoever_has_seen_the_end_is_told_to_stay_away(stack: Stack, job_id: str) -> None:
    succeed(stack, job_id)
    with stack.client as client:
        answer = client.get(f"/jobs/{job_id}/events", headers={"last-event-id": "end"})
    assert (answer.status_code, answer.content) == (204, b"")


def test_jobs_that_are_not_there_are_problems(stack: Stack, job_id: str) -> None:
    with stack.client as client:
        assert_problem(client.get(f"/jobs/{new_job_id()}/events"), 404, "job_not_found")
        assert_problem(client.get("/jobs/x/events"), 404, "job_not_found")
        client.delete(f"/jobs/{job_id}").raise_for_status()
        assert_problem(client.get(f"/jobs/{job_id}/events"), 410, "job_gone")


def test_the_stream_of_a_job_that_is_deleted_ends(stack: Stack, job_id: str) -> None:
    with watching(stack, job_id) as events:
        next(events)
        with stack.client as client:
            client.delete(f"/jobs/{job_id}").raise_for_status()
        assert list(events) == []


# -- without Redis ---------------------------------------------------------------------------------------


def test_redis_may_go_and_come_back_while_one_watches(stack: Stack, video: Path, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "own-redis") as server, connect(server.url, timeout_seconds=5) as redis:
        stack.start_api(redis_url=server.url)
        job_id, other = stack.post(video)["id"], stack.post(video)["id"]
        with watching(stack, job_id) as events, watching(stack, other) as others:
            assert next(events).kind == next(others).kind == "status"
            redis.shutdown()
            time.sleep(1)
            with stack.client as client:
                assert_problem(client.get(f"/jobs/{job_id}/events"), 503, "queue_unavailable")
            succeed(stack, other)
            assert [(told.kind, told.data["status"]) for told in others] == [("end", "succeeded")]
            with subprocess.Popen(tethered(server.command)) as restarted:
                wait_until(server.answers)
                Worker(stack, redis, job_id).report(7)
                told = next(events)
                while told.kind != "progress":  # the status may be told anew
                    told = next(events)
                assert told.data["frames_done"] == 7
                restarted.terminate()
    with watching(stack, other) as others:
        assert [told.kind for told in others] == ["status", "end"]


def test_a_quiet_stream_gives_signs_of_life_without_redis(stack: Stack, video: Path, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "own-redis") as server:
        stack.start_api(redis_url=server.url)
        job_id = stack.post(video)["id"]
        with stack.client as client, client.stream("GET", f"/jobs/{job_id}/events") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: status"
            server.stop()
            assert next(line for line in lines if line.startswith(":")) == ": ping"


# -- many, slow and stubborn clients ---------------------------------------------------------------------


def test_streams_end_when_the_api_is_told_to(stack: Stack, job_id: str) -> None:
    (api,) = stack.processes
    with watching(stack, job_id) as events:
        next(events)
        api.terminate()
        assert list(events) == []
    api.wait(timeout=8)


def test_hundreds_may_watch(stack: Stack, redis: Redis, job_id: str) -> None:
    api = psutil.Process(stack.processes[0].pid)
    worker = Worker(stack, redis, job_id)
    began = threading.Semaphore(0)

    def watch(_: int) -> list[str]:
        with watching(stack, job_id) as events:
            kinds = [next(events).kind]
            began.release()
            return kinds + [told.kind for told in events]

    with stack.client as client:
        client.get("/readyz").raise_for_status()
        with ThreadPoolExecutor(200) as threads:
            watchers = threads.map(watch, range(200))
            for _ in range(200):
                assert began.acquire(timeout=60)
            worker.begin()
            for frames in range(10):
                worker.report(frames)
                client.get(f"/jobs/{job_id}").raise_for_status()  # needs a thread
            assert api.num_threads() < 80
            worker.fail()
            assert [*watchers] == [["status", "status", *["progress"] * 10, "end"]] * 200
        wait_until(lambda: sum(c.status == "ESTABLISHED" for c in api.net_connections("tcp")) <= 20)


def test_clients_that_do_not_read_cost_no_memory(stack: Stack, redis: Redis, job_id: str) -> None:
    api = psutil.Process(stack.processes[0].pid)
    worker = Worker(stack, redis, job_id)
    request = f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: [::1]\r\n\r\n".encode()
    clients = []
    for _ in range(20):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", stack.port))
        client.sendall(request)
        clients.append(client)
    before = api.memory_info().rss
    for frames in range(20_000):
        worker.report(frames)
    assert api.memory_info().rss - before < 40 * 2**20
    for client in clients:
        client.close()
    succeed(stack, job_id)
    with watching(stack, job_id) as events:
        assert [told.kind for told in events] == ["status", "end"]
