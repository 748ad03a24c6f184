"""What happens to a job, and to the warm engine, when something is stopped, killed or too slow."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from service.supervisor import EXIT_MISCONFIGURED
from tests.integration.conftest import Stack, eventually
from tests.videos import moving_square, write_video
from tests.waiting import wait_until, wait_until_gone

pytestmark = pytest.mark.processes


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Long enough to be caught in the middle: it takes some seconds."""
    return write_video(tmp_path / "clip.mp4", moving_square(150))


@pytest.fixture
def working(stack: Stack) -> Iterator[Stack]:
    stack.start_api()
    stack.start_worker()
    return stack


def engine_pid(stack: Stack) -> int:
    pid: int = stack.workers()[0]["engine_pid"]
    return pid


def horse(stack: Stack) -> psutil.Process:
    """The process that RQ has forked for the running job: the worker's child that is not the engine."""
    worker = psutil.Process(stack.processes[-1].pid)

    def look() -> psutil.Process | None:
        horses = [child for child in worker.children() if child.pid != engine_pid(stack)]
        return horses[0] if horses else None

    return eventually(look, within_seconds=20, what="there is a horse")


def begins(stack: Stack, job_id: str, attempt: int) -> bool:
    return bool(stack.job(job_id)["attempt"] == attempt)


def test_a_canceled_job_ends_without_artifacts_and_the_worker_is_free(working: Stack, video: Path) -> None:
    engine = engine_pid(working)
    job_id = working.post(video)["id"]
    working.running(job_id)
    with working.client as client:
        answer = client.post(f"/jobs/{job_id}/cancel")
        assert answer.status_code == 202
        assert answer.json()["status"] in ("canceling", "canceled")
        job = working.ended(job_id, within_seconds=5)
        assert job["status"] == "canceled"
        assert client.post(f"/jobs/{job_id}/cancel").status_code == 200
        assert client.get(f"/jobs/{job_id}/artifacts/masks.zip").status_code == 409
    assert working.ended(working.post(video)["id"])["status"] == "succeeded"
    assert engine_pid(working) == engine


def test_a_deleted_running_job_leaves_nothing(working: Stack, video: Path) -> None:
    job_id = working.post(video)["id"]
    working.running(job_id)
    with working.client as client:
        assert client.delete(f"/jobs/{job_id}").status_code == 204
        assert client.get(f"/jobs/{job_id}").status_code == 410
    worker = psutil.Process(working.processes[-1].pid)
    eventually(lambda: len(worker.children()) == 1, within_seconds=5, what="the horse is gone")
    files = {path.relative_to(working.data_dir) for path in working.data_dir.rglob("*") if path.is_file()}
    assert files == {Path("identity"), Path("tombstones") / job_id}


def test_a_job_survives_the_death_of_its_horse(working: Stack, video: Path) -> None:
    engine = engine_pid(working)
    job_id = working.post(video)["id"]
    working.running(job_id)
    horse(working).kill()
    job = working.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert engine_pid(working) == engine


def test_a_job_survives_the_death_of_the_engine(working: Stack, video: Path) -> None:
    engine = engine_pid(working)
    job_id = working.post(video)["id"]
    working.running(job_id)
    os.kill(engine, signal.SIGKILL)
    job = working.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert engine_pid(working) != engine


def test_an_engine_that_hangs_is_replaced(stack: Stack, video: Path) -> None:
    stack.start_api()
    stack.start_worker(engine_stall_seconds=2)
    engine = engine_pid(stack)
    job_id = stack.post(video)["id"]
    stack.running(job_id)
    os.kill(engine, signal.SIGSTOP)
    job = stack.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert engine_pid(stack) != engine


def test_a_job_that_kills_every_horse_fails_after_its_attempts(working: Stack, video: Path) -> None:
    job_id = working.post(video)["id"]
    for attempt in (1, 2, 3):
        begun = partial(begins, working, job_id, attempt)
        eventually(begun, within_seconds=30, what=f"attempt {attempt} begins")
        horse(working).kill()
    job = working.ended(job_id, within_seconds=30)
    assert (job["status"], job["attempt"]) == ("failed", 3)
    assert job["error"]["code"] == "worker_crashed"
    assert job["started_at"] is not None


def test_sigterm_gives_the_job_back_to_the_queue_and_uses_up_no_attempt(stack: Stack, video: Path) -> None:
    stack.start_api(max_attempts=1)
    worker = stack.start_worker(max_attempts=1)
    job_id = stack.post(video)["id"]
    stack.running(job_id)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=10) == 0
    assert stack.job(job_id)["status"] == "queued"
    assert stack.workers() == []
    stack.start_worker(max_attempts=1)
    assert stack.ended(job_id)["status"] == "succeeded"


def test_a_worker_that_looks_elsewhere_does_not_start(stack: Stack, tmp_path: Path) -> None:
    stack.start_api()
    worker = stack.start("worker", data_dir=tmp_path / "elsewhere")
    assert worker.wait(timeout=30) == EXIT_MISCONFIGURED


def test_sigterm_while_the_model_is_loading_ends_the_worker(stack: Stack) -> None:
    stack.start_api()
    worker = stack.start("worker")
    wait_until(lambda: psutil.Process(worker.pid).children(), timeout_seconds=30)
    (engine,) = psutil.Process(worker.pid).children()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=10) == 0
    wait_until_gone([engine], timeout_seconds=10)


def test_a_stopped_worker_leaves_no_process(working: Stack, video: Path) -> None:
    worker = working.processes[-1]
    working.running(working.post(video)["id"])
    family = psutil.Process(worker.pid).children(recursive=True)
    assert len(family) == 2
    worker.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_job_over_its_time_limit_fails_and_the_next_one_runs(
    stack: Stack, video: Path, tmp_path: Path
) -> None:
    stack.start_api(job_timeout_seconds=2)
    stack.start_worker(job_timeout_seconds=2)
    slow = write_video(tmp_path / "slow.mp4", moving_square(600))
    job = stack.ended(stack.post(slow)["id"], within_seconds=30)
    assert (job["status"], job["error"]["code"]) == ("failed", "job_timeout")
    quick = write_video(tmp_path / "quick.mp4", moving_square(3))
    assert stack.ended(stack.post(quick)["id"])["status"] == "succeeded"


def test_a_dead_workers_job_is_finished_by_another(stack: Stack, video: Path) -> None:
    stack.start_api()
    worker = stack.start_worker()
    job_id = stack.post(video)["id"]
    stack.running(job_id)
    worker.kill()
    worker.wait()
    stack.start_worker()
    job = stack.ended(job_id, within_seconds=90)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)


def test_a_video_that_takes_too_much_memory_fails_its_job_at_once(stack: Stack, tmp_path: Path) -> None:
    stack.start_api()
    stack.start_worker(decode_memory_bytes=250 * 2**20)
    large = write_video(tmp_path / "large.mp4", moving_square(3, width=3840, height=2160))
    job = stack.ended(stack.post(large)["id"])
    assert (job["status"], job["error"]["code"], job["attempt"]) == ("failed", "resource_limit", 1)
    small = write_video(tmp_path / "small.mp4", moving_square(3))
    assert stack.ended(stack.post(small)["id"])["status"] == "succeeded"
