"""Row 1 once more, with the settings as they come: the 40 seconds of the catalogue."""

from collections.abc import Callable
from pathlib import Path

import pytest

from service.settings import ServiceSettings
from tests.chaos.conftest import Row, Scale
from tests.chaos.faults import family, kill
from tests.chaos.rig import Rig

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

DEFAULTS = {
    name: ServiceSettings.model_fields[name].default
    for name in ("lease_seconds", "reconcile_seconds", "sweep_interval_seconds")
}
LIMIT_SECONDS = 40


@pytest.mark.row(1, "kill -9 of all three at the default leases")
def test_a_job_of_a_dead_worker_runs_again_within_forty_seconds(
    make_rig: Callable[..., Rig], clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    if scale.name != "full":
        pytest.skip("takes a lease of 30 s: --chaos full")
    rig = make_rig(**DEFAULTS)
    rig.start_api()
    rig.start_workers(2)
    video = clip(240)
    rig.learn(video)
    with rig.trial() as client:
        job_id = client.accepted(video)
        client.running(job_id, frames=60)
        kill(*family(rig.worker_at_work()))
        seconds = client.seconds_until_running(job_id)
        job = client.ended(job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 2), job
        rig.replace_the_dead()
    row.runs += 1
    row.slowest("recovery", [seconds], limit_seconds=LIMIT_SECONDS)
