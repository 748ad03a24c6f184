"""Rows 9 and 20: between the storage and the queue the API dies; more is posted than may wait."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import psutil
import pytest

from tests.chaos.client import Client, identity
from tests.chaos.conftest import Row, Scale
from tests.chaos.faults import kill
from tests.chaos.rig import Rig
from tests.chaos.sabotage import exit_at_delivery
from tests.integration.conftest import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

QUEUED_SECONDS = 60
CLIENTS = 16


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig], clip: Callable[[int], Path]) -> Rig:
    """Without a worker; its archives are known."""
    rig = make_rig(upload_idle_seconds=1, probe_timeout_seconds=5, max_queued_jobs=10_000)
    rig.start_api()
    worker = rig.start_worker()
    rig.learn(clip(3))
    rig.dismiss(worker)
    return rig


def all_jobs(client: Client) -> list[dict[str, Any]]:
    """Every job there is, acknowledged or not; the oldest first."""
    jobs: list[dict[str, Any]] = []
    cursor = None
    while True:
        answer = client.call("GET", "/jobs", params={"limit": 100} | ({"cursor": cursor} if cursor else {}))
        assert answer is not None
        assert answer.status_code == 200, answer.text
        jobs += answer.json()["items"]
        cursor = answer.json()["next_cursor"]
        if cursor is None:
            return jobs[::-1]


def all_are_queued(client: Client) -> bool:
    return all(job["queue_position"] for job in all_jobs(client))


# -- the API dies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=pytest.mark.row(9, f"API dies {moment} queueing what it has stored"))
        for moment in ("before", "after")
    ],
)
def test_a_job_that_was_stored_and_not_acknowledged_is_queued_once(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row, moment: Literal["before", "after"]
) -> None:
    queued = []
    for _ in range(scale.of(quick=1, full=5)):
        stop_api(rig)
        api = rig.start_api(environment=exit_at_delivery(moment))
        with rig.trial() as client:
            with rig.history.during("the API kills itself"):
                assert client.post(clip(3)) is None
                api.wait(timeout=10)
                rig.start_api()
            began_at = time.monotonic()
            eventually(
                lambda: all_are_queued(client), within_seconds=QUEUED_SECONDS, what="the job is queued"
            )
            queued.append(time.monotonic() - began_at)
            (job,) = all_jobs(client)
            assert job["queue_position"] == 1
            assert rig.server.client.llen("rq:queue:imcnet") == 1
            assert client.delete(job["id"])
        row.runs += 1
    row.slowest("queueing", queued, limit_seconds=QUEUED_SECONDS)


@pytest.mark.row(9, "kill -9 of the API at random moments of many posts")
def test_of_many_posts_to_an_api_that_is_killed_none_is_lost_or_doubled(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    queued, unacknowledged = [], 0
    with rig.trial() as client:
        for _ in range(scale.of(quick=3, full=20)):
            over = threading.Event()
            with rig.history.during("the API is killed"), ThreadPoolExecutor(4) as threads:
                keyed = [threads.submit(post_until_accepted, rig, clip(3), over) for _ in range(2)]
                keyless = [threads.submit(post_now_and_then, rig, clip(3), over) for _ in range(2)]
                time.sleep(chance.uniform(0.3, 1))
                assert kill(psutil.Process(rig.api.pid))
                rig.api.wait()
                rig.replace_the_dead()
                over.set()
                accepted = [job_id for each in keyed for job_id in each.result()]
                assert len(set(accepted)) == len(accepted), "two keys stand for one job"
                unanswered = sum(each.result() for each in keyless)
            began_at = time.monotonic()
            eventually(lambda: all_are_queued(client), within_seconds=QUEUED_SECONDS, what="all are queued")
            queued.append(time.monotonic() - began_at)
            jobs = {job["id"] for job in all_jobs(client)}
            assert jobs >= set(rig.history.acknowledged)
            extra = jobs - set(rig.history.acknowledged)
            assert len(extra) <= unanswered
            unacknowledged += len(extra)
            for job_id in extra:
                assert client.delete(job_id)
            row.runs += 1
        worker = rig.start_worker()
        for job_id in rig.history.acknowledged:
            assert client.ended(job_id, within_seconds=300)["status"] == "succeeded"
        rig.dismiss(worker)
        row.figures["jobs"] = str(len(rig.history.acknowledged))
        row.figures["stored and not acknowledged"] = str(unacknowledged)
    row.slowest("queueing", queued, limit_seconds=QUEUED_SECONDS)


def post_until_accepted(rig: Rig, video: Path, over: threading.Event) -> list[str]:
    """Post videos, each again and again with the same key until it is accepted. Returns: The jobs."""
    accepted = []
    with rig.new_client("with keys") as client:
        while not over.is_set():
            key, job_id = str(uuid4()), None
            while job_id is None:
                job_id = client.post(video, headers={"Idempotency-Key": key})
                time.sleep(0.02)
            accepted.append(job_id)
    return accepted


def post_now_and_then(rig: Rig, video: Path, over: threading.Event) -> int:
    """Post videos, each once. Returns: Of how many the client does not know what has become."""
    unanswered = 0
    with rig.new_client("without keys") as client:
        while not over.is_set():
            unanswered += client.post(video) is None
            time.sleep(0.1)
    return unanswered


def stop_api(rig: Rig) -> None:
    rig.api.terminate()
    rig.api.wait(timeout=30)


# -- more than may wait ----------------------------------------------------------------------------------


@pytest.mark.row(20, "five times as many posts as may wait")
def test_what_the_queue_has_no_room_for_is_refused_and_the_rest_is_done(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    limit = scale.of(quick=10, full=100)
    stop_api(rig)
    rig.start_api(max_queued_jobs=limit)
    with rig.trial() as client:
        with rig.history.during("more is posted than may wait"), ThreadPoolExecutor(CLIENTS) as threads:
            accepted = sum(threads.map(lambda n: accepted_or_refused(rig, clip(3), f"{n}"), range(5 * limit)))
        row.runs = 5 * limit
        row.figures["accepted"] = f"{accepted} of {limit}"
        assert limit <= accepted <= limit + CLIENTS
        assert accepted == len(rig.history.acknowledged) == len(all_jobs(client))
        assert all_are_queued(client)
        began_at = time.monotonic()
        worker = rig.start_worker()
        for job_id in rig.history.acknowledged:
            assert client.ended(job_id, within_seconds=300)["status"] == "succeeded"
        row.figures["drained in"] = f"{time.monotonic() - began_at:.0f} s"
        assert client.ended(client.accepted(clip(3)))["status"] == "succeeded"
    rig.dismiss(worker)


def accepted_or_refused(rig: Rig, video: Path, name: str) -> bool:
    with rig.new_client(name) as client:
        files = {"video": (video.name, video.read_bytes())}
        answer = client.call("POST", "/jobs", sent=identity(video), files=files)
    assert answer is not None
    if answer.status_code != 202:
        assert (answer.status_code, answer.json()["code"]) == (503, "queue_full"), answer.text
        assert int(answer.headers["Retry-After"]) > 0
    return answer.status_code == 202
