"""Row 17: workers whose clocks are five minutes off."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.conftest import Row, Scale
from tests.chaos.faults import family, kill
from tests.chaos.rig import LEASE_SECONDS, Rig
from tests.chaos.sabotage import shifted_clock
from tests.integration.conftest import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

FRAMES = 240
SECONDS_OFF = (-300, 0, 300)


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig]) -> Rig:
    rig = make_rig()
    rig.start_api()
    for seconds in SECONDS_OFF:
        rig.launch_worker(environment=shifted_clock(seconds))
    eventually(lambda: len(rig.workers()) == len(SECONDS_OFF), within_seconds=90, what="all are ready")
    return rig


@pytest.mark.row(17, "clocks of two of three workers off by -300 s and +300 s")
def test_jobs_that_outlast_their_lease_are_run_once_whatever_the_clocks_say(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    video = clip(FRAMES)
    rig.learn(video)
    for _ in range(scale.of(quick=1, full=3)):
        with rig.trial() as client:
            job_ids = [client.accepted(video) for _ in range(2 * len(SECONDS_OFF))]
            jobs = [client.ended(job_id, within_seconds=120) for job_id in job_ids]
            assert {(job["status"], job["attempt"]) for job in jobs} == {("succeeded", 1)}
            row.runs += len(jobs)
            outlasting = [call for call in rig.history.calls if call.job_status == "running"]
            assert outlasting[-1].began_at - outlasting[0].began_at > 2 * LEASE_SECONDS


@pytest.mark.row(17, "the same, and all but one killed in a job")
def test_a_dead_worker_loses_its_lease_in_time_whatever_its_clock_says(
    rig: Rig, clip: Callable[[int], Path], row: Row
) -> None:
    video = clip(FRAMES)
    rig.learn(video)
    recoveries = []
    for _ in range(len(SECONDS_OFF) - 1):
        with rig.trial() as client:
            job_id = client.accepted(video)
            client.running(job_id)
            kill(*family(rig.worker_at_work()))
            recoveries.append(client.seconds_until_running(job_id))
            job = client.ended(job_id)
            assert (job["status"], job["attempt"]) == ("succeeded", 2), job
        row.runs += 1
    rig.replace_the_dead()
    row.slowest("recovery", recoveries, limit_seconds=LEASE_SECONDS + 10)
