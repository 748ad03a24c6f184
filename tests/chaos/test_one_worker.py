"""Rows 3 and 6: a job that crashes its only worker again and again, or is told to make way."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.client import TERMINAL
from tests.chaos.conftest import Row, Scale
from tests.chaos.faults import horse, kill
from tests.chaos.rig import Rig
from tests.integration.conftest import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

FRAMES = 240
ATTEMPTS = 3
NEXT_JOB_SECONDS = 45
GRACE_SECONDS = 10


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig]) -> Rig:
    rig = make_rig(max_attempts=ATTEMPTS)
    rig.start_api()
    rig.start_worker()
    return rig


@pytest.mark.row(3, "a job that kills every horse")
def test_a_job_that_kills_every_horse_is_given_up_and_the_next_one_runs(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    rig.learn(clip(5))
    waits = []
    for _ in range(scale.of(quick=1, full=5)):
        with rig.trial() as client:
            poison = client.accepted(clip(FRAMES))
            for attempt in range(1, ATTEMPTS + 1):
                client.running(poison, attempt=attempt)
                if attempt == 1:
                    healthy = client.accepted(clip(5))
                victim = eventually(
                    lambda: horse(rig.living_workers[0]), within_seconds=10, what="there is a horse"
                )
                assert kill(victim)
            killed_at = time.monotonic()
            client.watch(
                healthy,
                lambda job: job["status"] == "running" or job["status"] in TERMINAL,
                within_seconds=NEXT_JOB_SECONDS + 10,
                what="the next job starts",
            )
            waits.append(time.monotonic() - killed_at)
            job = client.ended(poison)
            assert (job["status"], job["attempt"]) == ("failed", ATTEMPTS), job
            assert job["error"]["code"] == "worker_crashed"
            assert client.ended(healthy)["status"] == "succeeded"
        row.runs += 1
    row.slowest("start of the next job", waits, limit_seconds=NEXT_JOB_SECONDS)


@pytest.mark.row(6, "SIGTERM in a job, more often than it has attempts")
def test_a_job_that_makes_way_is_next_and_uses_up_no_attempt(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    rig.learn(clip(FRAMES))
    rig.learn(clip(5))
    graces = []
    for _ in range(scale.of(quick=1, full=3)):
        with rig.trial() as client:
            job_id = client.accepted(clip(FRAMES))
            client.running(job_id)
            behind = client.accepted(clip(5))
            for time_over in range(ATTEMPTS + 1):
                client.running(job_id, frames=40 * time_over + chance.randint(1, 40))
                (worker,) = rig.living_workers
                told_at = time.monotonic()
                worker.send_signal(signal.SIGTERM)
                assert worker.wait(timeout=GRACE_SECONDS) == 0
                graces.append(time.monotonic() - told_at)
                job = client.job(job_id)
                assert job is not None
                if job["status"] == "succeeded":
                    break
                assert (job["status"], job["queue_position"]) == ("queued", 1), job
                rig.replace_the_dead()
                row.runs += 1
            job = client.ended(job_id)
            assert job["status"] == "succeeded", job
            rig.replace_the_dead()
            assert client.ended(behind)["status"] == "succeeded"
    assert row.runs > ATTEMPTS
    row.slowest("grace", graces, limit_seconds=GRACE_SECONDS)
