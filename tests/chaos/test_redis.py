"""Rows 12 to 14: Redis is killed, cannot be reached, hangs, is full, or is emptied."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.chaos.client import TERMINAL, Client
from tests.chaos.conftest import Row, Scale
from tests.chaos.faults import stopped
from tests.chaos.proxy import Proxy
from tests.chaos.rig import LEASE_SECONDS, Rig
from tests.integration.conftest import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

FLOWS_AGAIN_SECONDS = 10
ANSWER_SECONDS = 2
SHORT, LONG = 40, 500  # frames


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig]) -> Rig:
    rig = make_rig()
    rig.start_api()
    rig.start_worker()
    return rig


# -- killed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("kill", marks=pytest.mark.row(12, "Redis kill -9 under load")),
        pytest.param("shutdown", marks=pytest.mark.row(12, "Redis restarted under load")),
    ],
)
def test_no_acknowledged_job_is_lost_with_redis(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row, end: str
) -> None:
    video = clip(3)
    rig.learn(video)
    recoveries = []
    with rig.trial() as client:
        engine_pid = rig.workers()[0]["engine_pid"]
        with load(rig, video):
            for _ in range(scale.of(quick=2, full=5)):
                time.sleep(chance.uniform(1, 3))
                with rig.history.during(f"Redis: {end}"):
                    end_redis(rig, end)
                    time.sleep(chance.uniform(0, 2))
                    rig.server.start()
                    recoveries.append(seconds_until_a_job_is_done(rig, client))
                row.runs += 1
        for job_id in rig.history.acknowledged:
            assert client.ended(job_id, within_seconds=120)["status"] == "succeeded"
        assert rig.workers()[0]["engine_pid"] == engine_pid
    row.slowest("recovery", recoveries, limit_seconds=FLOWS_AGAIN_SECONDS)


def end_redis(rig: Rig, end: str) -> None:
    if end == "kill":
        rig.server.kill()
    else:
        rig.server.client.shutdown(save=False)
        rig.server.process.wait()


@contextmanager
def load(rig: Rig, video: Path) -> Iterator[None]:
    """Two clients post all the time, well or not."""
    over = threading.Event()

    def post(name: str) -> None:
        with rig.new_client(name) as client:
            while not over.wait(0.5):
                client.post(video)

    with ThreadPoolExecutor(2) as threads:
        posting = [threads.submit(post, name) for name in ("one", "two")]
        try:
            yield
        finally:
            over.set()
    for each in posting:
        each.result()


def seconds_until_a_job_is_done(rig: Rig, client: Client) -> float:
    """Until a job succeeds of which nobody has seen yet that it has, and one is accepted."""
    began_at = time.monotonic()
    before = len(rig.history.acknowledged)
    done = {call.job_id for call in rig.history.calls if call.job_status in TERMINAL}

    def look() -> bool:
        pending = [job_id for job_id in rig.history.acknowledged if job_id not in done]
        jobs = [job for job_id in pending[:10] if (job := client.job(job_id))]
        return len(rig.history.acknowledged) > before and any(job["status"] == "succeeded" for job in jobs)

    eventually(look, within_seconds=60, what="jobs flow again")
    return time.monotonic() - began_at


# -- away ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy(apart: Rig) -> Iterator[Proxy]:
    with Proxy(apart.server.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def apart(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


@pytest.fixture(scope="module")
def behind_proxy(apart: Rig, proxy: Proxy, clip: Callable[[int], Path]) -> Rig:
    """API and two workers reach Redis through the proxy, the test reaches it directly."""
    url = f"redis://127.0.0.1:{proxy.port}"
    apart.start_api(redis_url=url)
    apart.start_workers(2, redis_url=url)
    for frames in (SHORT, LONG):
        apart.learn(clip(frames))
    return apart


@contextmanager
def refused(rig: Rig, proxy: Proxy) -> Iterator[None]:
    proxy.refuse()
    try:
        yield
    finally:
        proxy.forward()


@contextmanager
def hung(rig: Rig, proxy: Proxy) -> Iterator[None]:
    proxy.hang()
    try:
        yield
    finally:
        proxy.forward()


@contextmanager
def frozen(rig: Rig, proxy: Proxy) -> Iterator[None]:
    with stopped(psutil.Process(rig.server.process.pid)):
        yield


@pytest.mark.parametrize(
    "away",
    [
        pytest.param(refused, marks=pytest.mark.row(13, "Redis refuses connections")),
        pytest.param(hung, marks=pytest.mark.row(13, "Redis takes everything and answers nothing")),
        pytest.param(frozen, marks=pytest.mark.row(13, "Redis is stopped (SIGSTOP)")),
    ],
)
def test_without_redis_all_is_answered_and_running_jobs_finish(
    behind_proxy: Rig,
    proxy: Proxy,
    clip: Callable[[int], Path],
    scale: Scale,
    row: Row,
    away: Callable[[Rig, Proxy], AbstractContextManager[None]],
) -> None:
    rig = behind_proxy
    answers: list[float] = []
    for _ in range(scale.of(quick=1, full=2)):
        with rig.trial() as client:
            engines = _engines(rig)
            done = client.accepted(clip(SHORT))
            client.ended(done)
            long, short = client.accepted(clip(LONG)), client.accepted(clip(SHORT))
            client.running(long)
            client.running(short)
            waiting = client.accepted(clip(SHORT))
            with rig.history.during(f"Redis is away: {away.__name__}"):
                with away(rig, proxy):
                    began_at = time.monotonic()
                    answers += answered_without_redis(rig, client, done=done, active=long, video=clip(SHORT))
                    finished = client.ended(short)
                    assert (finished["status"], finished["attempt"]) == ("succeeded", 1)
                    time.sleep(max(0.0, began_at + 2 * LEASE_SECONDS - time.monotonic()))
                eventually(lambda: is_ready(client), within_seconds=FLOWS_AGAIN_SECONDS, what="all is well")
            for job_id in (long, short, waiting):
                job = client.ended(job_id)
                assert (job["status"], job["attempt"]) == ("succeeded", 1), job
            eventually(
                partial(_has_engines, rig, engines),
                within_seconds=FLOWS_AGAIN_SECONDS,
                what="all workers have reported, with the engines that they had",
            )
        row.runs += 1
    row.slowest("answer", answers, limit_seconds=ANSWER_SECONDS)


def _engines(rig: Rig) -> set[int]:
    return {worker["engine_pid"] for worker in rig.workers()}


def _has_engines(rig: Rig, engines: set[int]) -> bool:
    return _engines(rig) == engines


def answered_without_redis(rig: Rig, client: Client, *, done: str, active: str, video: Path) -> list[float]:
    """Make every kind of call, alone and with many others. Returns: The seconds that the calls took."""
    before = len(rig.history.calls)
    for method, path, expected in (
        ("GET", "/livez", 200),
        ("GET", "/readyz", 503),
        ("GET", "/version", 200),
        ("GET", f"/jobs/{done}", 200),
        ("GET", f"/jobs/{done}/artifacts/masks.zip", 200),
        ("GET", f"/jobs/{active}/artifacts/masks.zip", 409),
    ):
        answer = client.call(method, path, job_id=done if done in path else None)
        assert answer is not None, path
        assert answer.status_code == expected, path
    for method, path in (("GET", f"/jobs/{active}"), ("GET", "/jobs"), ("GET", f"/jobs/{active}/events")):
        says_come_back_later(client.call(method, path))
    says_come_back_later(client.call("POST", "/jobs", files={"video": video.read_bytes()}))
    with ThreadPoolExecutor(20) as threads:
        many = [threads.submit(look, rig, f"{number}", active) for number in range(20)]
    for each in many:
        says_come_back_later(each.result())
    return [call.ended_at - call.began_at for call in rig.history.calls[before:]]


def look(rig: Rig, name: str, job_id: str) -> httpx.Response | None:
    with rig.new_client(name) as client:
        return client.call("GET", f"/jobs/{job_id}")


def says_come_back_later(answer: httpx.Response | None) -> None:
    assert answer is not None
    assert answer.status_code == 503, answer.text
    assert answer.json()["code"] == "queue_unavailable"
    assert int(answer.headers["Retry-After"]) > 0


def is_ready(client: Client) -> bool:
    answer = client.call("GET", "/readyz")
    return answer is not None and answer.status_code == 200


# -- emptied, full ---------------------------------------------------------------------------------------


@pytest.mark.row(14, "Redis emptied (FLUSHALL)")
def test_what_redis_held_is_rebuilt_in_order_after_flushall(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    rig.learn(clip(SHORT))
    rig.learn(clip(240))
    for _ in range(scale.of(quick=1, full=3)):
        with rig.trial() as client:
            done = client.accepted(clip(SHORT))
            client.ended(done)
            running = client.accepted(clip(240))
            client.running(running, frames=chance.randint(1, 100))
            queued = [client.accepted(clip(SHORT)) for _ in range(3)]
            with rig.history.during("FLUSHALL"):
                rig.server.client.flushall()
            assert client.ended(done)["status"] == "succeeded"
            assert client.download(done)
            places = [
                client.watch(job_id, place, within_seconds=10, what="queued again") for job_id in queued
            ]
            assert [job["queue_position"] for job in places] == [1, 2, 3]
            jobs = [client.ended(job_id) for job_id in (running, *queued)]
            assert [(job["status"], job["attempt"]) for job in jobs] == [("succeeded", 1)] * 4
            finished = [job["finished_at"] for job in jobs]
            assert finished == sorted(finished)
            time.sleep(LEASE_SECONDS + 1)
            assert client.job(running) == jobs[0]
            eventually(lambda: len(rig.workers()) == 1, within_seconds=10, what="the worker is known again")
        row.runs += 1


def place(job: dict[str, object]) -> object:
    return job["queue_position"]


@pytest.mark.row(14, "Redis full (maxmemory, noeviction)")
def test_a_full_redis_takes_no_jobs_and_loses_none(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    rig.learn(clip(SHORT))
    rig.learn(clip(240))
    redis = rig.server.client
    for _ in range(scale.of(quick=1, full=3)):
        with rig.trial() as client:
            engine_pid = rig.workers()[0]["engine_pid"]
            running = client.accepted(clip(240))
            client.running(running)
            waiting = client.accepted(clip(SHORT))
            with rig.history.during("Redis is full"):
                redis.config_set("maxmemory", 1)
                try:
                    for _ in range(5):
                        answer = client.call("POST", "/jobs", files={"video": clip(SHORT).read_bytes()})
                        says_come_back_later(answer)
                    job = client.ended(running)
                    assert (job["status"], job["attempt"]) == ("succeeded", 1), job
                    time.sleep(LEASE_SECONDS)
                finally:
                    redis.config_set("maxmemory", 0)
                eventually(lambda: is_ready(client), within_seconds=FLOWS_AGAIN_SECONDS, what="all is well")
            job = client.ended(waiting)
            assert (job["status"], job["attempt"]) == ("succeeded", 1), job
            after = client.accepted(clip(SHORT))
            assert client.ended(after)["status"] == "succeeded"
            assert rig.workers()[0]["engine_pid"] == engine_pid
        row.runs += 1
