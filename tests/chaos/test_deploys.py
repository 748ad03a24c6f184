"""A deploy: for a while, processes of two releases work on the same jobs.

Two releases need not make equal bytes of equal masks: what is right is learned from the worker's own.
"""

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.chaos.conftest import Row
from tests.chaos.rig import Rig
from tests.conftest import REPOSITORY
from tests.videos import moving_square, write_video

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

PREVIOUS = "47906cb"  # the last commit of the release before this one


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Environment in which ``imcnet`` is that of the release before."""
    directory = tmp_path_factory.mktemp("previous")
    packages = ("service", "worker", "model", ":(exclude)*.safetensors")
    archive = subprocess.run(
        ["git", "archive", PREVIOUS, *packages], cwd=REPOSITORY, capture_output=True, check=False
    )
    if archive.returncode != 0:
        pytest.skip("the release before this one is not in the repository's history")
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive.stdout, check=True)
    return {"PYTHONPATH": str(directory)}


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", moving_square(60))


@pytest.mark.row(6, "deploy: API of this release, worker of the last")
def test_a_worker_of_the_last_release_finishes_what_this_api_accepts(
    make_rig: Callable[..., Rig], previous: Mapping[str, str], video: Path, row: Row
) -> None:
    rig = make_rig()
    api = rig.start_api(environment=previous)
    rig.start_worker(environment=previous)
    rig.learn(video)
    _end(api)
    rig.start_api()
    _finish_some(rig, video, row)


@pytest.mark.row(6, "deploy: API of the last release, worker of this one")
def test_a_worker_of_this_release_finishes_what_the_last_api_accepts(
    make_rig: Callable[..., Rig], previous: Mapping[str, str], video: Path, row: Row
) -> None:
    rig = make_rig()
    api = rig.start_api()
    rig.start_worker()
    rig.learn(video)
    _end(api)
    rig.start_api(environment=previous)
    _finish_some(rig, video, row)


@pytest.mark.row(6, "deploy: all replaced in the middle of a job")
def test_a_job_that_the_last_release_has_begun_is_finished_by_this_one(
    make_rig: Callable[..., Rig], previous: Mapping[str, str], video: Path, row: Row
) -> None:
    rig = make_rig()
    api = rig.start_api(environment=previous)
    old = rig.start_worker(environment=previous)
    with rig.new_client("client") as client:
        job_id = client.post(video)
        assert job_id is not None
        client.running(job_id)
        old.terminate()
        assert old.wait(timeout=30) == 0
        _end(api)
        rig.start_api()
        rig.start_worker()
        job = client.ended(job_id)
        assert job["status"] == "succeeded", job
        assert client.download(job_id)
    row.runs = 1


def _end(api: subprocess.Popen[bytes]) -> None:
    api.terminate()
    api.wait(timeout=30)


def _finish_some(rig: Rig, video: Path, row: Row) -> None:
    with rig.trial() as client:
        for _ in range(3):
            job_id = client.post(video)
            assert job_id is not None
            job = client.ended(job_id)
            assert job["status"] == "succeeded", job
            row.runs += 1
