"""Row 2: the horse, or its whole worker, dies before each single step that a job makes in the storage."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.client import TERMINAL, Client
from tests.chaos.conftest import Row, Scale
from tests.chaos.rig import Rig
from tests.chaos.sabotage import ExitAtStep, Victim
from tests.integration.conftest import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

NEVER = 1_000_000


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig]) -> Rig:
    rig = make_rig(span_frames=1000)
    rig.start_api()
    return rig


@pytest.fixture(scope="module")
def steps(rig: Rig) -> ExitAtStep:
    steps = ExitAtStep(rig.directory / "steps", rig.data_dir)
    rig.start_worker(environment=steps.environment)
    return steps


@pytest.mark.parametrize(
    ("victim", "quick"),
    [
        pytest.param(victim, quick, marks=pytest.mark.row(2, f"exit of {victim} at every step"), id=victim)
        for victim, quick in (("horse", 10), ("worker", 2))
    ],
)
def test_whatever_step_a_job_dies_at_its_archive_is_published_once_and_whole(
    rig: Rig,
    steps: ExitAtStep,
    clip: Callable[[int], Path],
    scale: Scale,
    row: Row,
    victim: Victim,
    quick: int,
) -> None:
    video = clip(3)
    rig.learn(video)
    names = steps_of_a_job(rig, steps, video)
    every = range(1, len(names) + 1)
    for step in every if scale.name == "full" else spread(every, quick):
        with rig.trial() as client:
            steps.order(step, victim=victim)
            job_id = client.accepted(video)
            job = downloaded_all_the_time(rig, client, job_id)
            assert job["status"] == "succeeded", job
            require_death_at(steps, step)
            rig.replace_the_dead()
        row.runs += 1
    row.figures["steps"] = str(len(names))


def steps_of_a_job(rig: Rig, steps: ExitAtStep, video: Path) -> list[str]:
    with rig.trial() as client:
        steps.order(NEVER)
        job_id = client.accepted(video)
        client.ended(job_id)
        eventually(lambda: "_exit" in " ".join(steps.taken()), within_seconds=10, what="the horse has ended")
    names = steps.taken()
    assert any(name.endswith("outcome.json") for name in names), names
    return names


def require_death_at(steps: ExitAtStep, step: int) -> None:
    """The last steps come after the job's end: the horse may still be on its way."""
    eventually(lambda: len(steps.taken()) >= step, within_seconds=10, what="the step is reached")
    assert len(steps.taken()) == step, "it died elsewhere"


def spread(every: range, count: int) -> list[int]:
    """So many of them, evenly, the last among them."""
    return sorted({every[-1 - round(index * (len(every) - 1) / count)] for index in range(count)})


def downloaded_all_the_time(rig: Rig, client: Client, job_id: str) -> dict[str, object]:
    """The job's end. Until then and once after it every download is tried: what comes has to be whole."""

    def look(job: dict[str, object]) -> bool:
        rig.relaunch_dead_workers()
        client.download(job_id)
        return job["status"] in TERMINAL

    return client.watch(job_id, look, within_seconds=60, what="the job ends")
