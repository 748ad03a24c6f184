"""Rows 1, 4 and 5: of two workers one is killed, sleeps past its lease, or comes second."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from rq import Queue
from rq.serializers import JSONSerializer

from tests.chaos.conftest import Row, Scale
from tests.chaos.faults import Worker, engine, family, horse, kill, stopped
from tests.chaos.rig import LEASE_SECONDS, SPAN_FRAMES, Rig
from tests.integration.conftest import eventually
from tests.waiting import wait_until_gone

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

FRAMES = 240
NOTICED_AT_ONCE_SECONDS = 10
NOTICED_BY_LEASE_SECONDS = LEASE_SECONDS + 10  # at the defaults 40


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig]) -> Rig:
    rig = make_rig()
    rig.start_api()
    rig.start_workers(2)
    return rig


def processes_of(worker: Worker, victim: str) -> list[psutil.Process | None]:
    match victim:
        case "engine":
            return [engine(worker)]
        case "horse":
            return [horse(worker)]
        case "worker":
            return [psutil.Process(worker.pid)]
        case _:
            return [*family(worker)]


def finished_spans(job_directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of everything that is finished: who makes it anew changes them."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in job_directory.glob("spans-*/*")
        if re.fullmatch(r"\d{6}", path.name)
    }


@pytest.mark.parametrize(
    ("victim", "limit_seconds", "quick"),
    [
        pytest.param(victim, seconds, quick, marks=pytest.mark.row(1, f"kill -9 of {victim}"), id=victim)
        for victim, seconds, quick in (
            ("engine", NOTICED_AT_ONCE_SECONDS, 2),
            ("horse", NOTICED_AT_ONCE_SECONDS, 2),
            ("worker", NOTICED_BY_LEASE_SECONDS, 1),
            ("all three", NOTICED_BY_LEASE_SECONDS, 1),
        )
    ],
)
def test_a_killed_job_goes_on_after_its_last_finished_span(
    rig: Rig,
    clip: Callable[[int], Path],
    scale: Scale,
    chance: random.Random,
    row: Row,
    victim: str,
    limit_seconds: float,
    quick: int,
) -> None:
    video = clip(FRAMES)
    rig.learn(video)
    recoveries, saved = [], 0
    for _ in range(scale.of(quick=quick, full=5)):
        with rig.trial() as client:
            job_id = client.accepted(video)
            client.running(job_id, frames=chance.randint(2 * SPAN_FRAMES, FRAMES // 2))
            worker = rig.worker_at_work()
            directory = rig.data_dir / "jobs" / job_id
            finished = finished_spans(directory)
            assert finished, "no span has been finished: there is nothing to resume from"
            assert kill(*processes_of(worker, victim)), "the victim was not alive"
            recoveries.append(client.seconds_until_running(job_id))
            assert finished.items() <= finished_spans(directory).items(), "finished spans were made again"
            job = client.ended(job_id)
            assert (job["status"], job["attempt"]) == ("succeeded", 2), job
            resumed_at = min(
                call.frames_done
                for call in rig.history.calls
                if call.job_status == "running" and call.attempt == 2 and call.frames_done
            )
            assert resumed_at >= len(finished) * SPAN_FRAMES
            saved += resumed_at
            rig.replace_the_dead()
        row.runs += 1
    row.slowest("recovery", recoveries, limit_seconds=limit_seconds)
    row.figures["frames not done twice"] = f"{saved} of {row.runs * FRAMES}"


@pytest.mark.row(4, "worker, engine and horse stopped past the lease")
def test_a_worker_that_wakes_up_after_its_lease_publishes_nothing(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    video = clip(FRAMES)
    rig.learn(video)
    takeovers = []
    for _ in range(scale.of(quick=2, full=20)):
        with rig.trial() as client:
            job_id = client.accepted(video)
            client.running(job_id, frames=chance.randint(1, FRAMES // 2))
            sleeper = rig.worker_at_work()
            stale = horse(sleeper)
            assert stale is not None
            with stopped(*family(sleeper)):
                takeovers.append(client.seconds_until_running(job_id))
                if chance.random() < 0.5:
                    client.ended(job_id)
                else:
                    time.sleep(chance.uniform(0, 2))
            job = client.ended(job_id)
            assert (job["status"], job["attempt"]) == ("succeeded", 2), job
            (published,) = (rig.data_dir / "jobs" / job_id).glob("artifacts-*")
            assert published.name == "artifacts-0002"
            wait_until_gone([stale], timeout_seconds=20)
            rig.replace_the_dead()
        row.runs += 1
    row.slowest("takeover", takeovers, limit_seconds=NOTICED_BY_LEASE_SECONDS)


@pytest.mark.row(4, "worker alone stopped past the lease, its horse goes on")
def test_a_horse_whose_worker_sleeps_publishes_once_or_not_at_all(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    video = clip(2 * FRAMES)
    rig.learn(video)
    first = 0
    for _ in range(scale.of(quick=1, full=3)):
        with rig.trial() as client:
            job_id = client.accepted(video)
            client.running(job_id, frames=chance.randint(1, FRAMES))
            sleeper = rig.worker_at_work()
            with stopped(psutil.Process(sleeper.pid)):
                job = client.ended(job_id)
            assert job["status"] == "succeeded", job
            assert job["attempt"] in (1, 2)
            first += job["attempt"] == 1
            rig.replace_the_dead()
        row.runs += 1
    row.figures["the horse was faster"] = f"{first} of {row.runs}"


@pytest.mark.row(5, "a job queued twice, and again after its end; two workers")
def test_a_job_that_is_delivered_twice_is_done_once(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    video = clip(20)
    rig.learn(video)
    for _ in range(scale.of(quick=4, full=15)):
        with rig.trial() as client:
            job_id = client.accepted(video)
            deliver_once_more(rig, job_id)
            time.sleep(chance.uniform(0, 0.5))
            deliver_once_more(rig, job_id)
            job = client.ended(job_id)
            assert (job["status"], job["attempt"]) == ("succeeded", 1), job
            deliver_once_more(rig, job_id)
            eventually(lambda: nothing_is_queued(rig), within_seconds=20, what="the queue is empty")
            assert client.job(job_id) == job
        row.runs += 1


def deliver_once_more(rig: Rig, job_id: str) -> None:
    """As a reconciliation gone wrong would do it, or an API that has lost its answer from Redis."""
    queue = Queue("imcnet", connection=rig.server.client, serializer=JSONSerializer)
    delivery = f"{job_id}-{uuid4().hex[:8]}"
    queue.enqueue_call("worker.tasks.segment_video", args=(job_id,), job_id=delivery, result_ttl=1)


def nothing_is_queued(rig: Rig) -> bool:
    lists = ("rq:queue:imcnet", "rq:queue:imcnet:intermediate")
    return not any(rig.server.client.llen(name) for name in lists) and not any(
        horse(worker) for worker in rig.living_workers
    )
