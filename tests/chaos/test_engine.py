"""Row 7: the forward pass hangs, or there is no memory for it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.chaos.client import Client
from tests.chaos.conftest import Row, Scale
from tests.chaos.faults import Worker, engine, kill, peak_bytes, starve, stopped
from tests.chaos.rig import Rig
from tests.integration.conftest import eventually
from tests.videos import moving_square, write_video
from tests.waiting import wait_until_gone

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

FRAMES = 240
JOB_SECONDS = 12
STALL_SECONDS = 2
LATE_SECONDS = 10
# More than one engine may reserve and another not (glibc's arenas take 64 MiB of addresses at a time), and
# less than half of what the four frames of the large video take.
SPARE_BYTES = 192 * 2**20
ATTEMPTS = 3
LARGE = 7680, 4320


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig]) -> Rig:
    width, height = LARGE
    rig = make_rig(job_timeout_seconds=JOB_SECONDS, max_attempts=ATTEMPTS, max_pixels=width * height)
    rig.start_api()
    return rig


@contextmanager
def one_worker(rig: Rig, **settings: object) -> Iterator[Worker]:
    worker = rig.start_worker(**settings)
    try:
        yield worker
    finally:
        rig.dismiss(worker)


def running_engine(worker: Worker) -> psutil.Process:
    return eventually(lambda: engine(worker), within_seconds=60, what="there is an engine")


def next_job_succeeds(client: Client, video: Path) -> None:
    job_id = client.accepted(video)
    job = client.ended(job_id, within_seconds=60)
    assert (job["status"], job["attempt"]) == ("succeeded", 1), job


@pytest.mark.row(7, "forward pass hangs, the engine's limit is first")
def test_a_hung_forward_pass_costs_an_attempt_and_an_engine(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    recoveries = []
    with one_worker(rig, engine_stall_seconds=STALL_SECONDS) as worker:
        rig.learn(clip(FRAMES))
        rig.learn(clip(5))
        for _ in range(scale.of(quick=1, full=3)):
            with rig.trial() as client:
                job_id = client.accepted(clip(FRAMES))
                client.running(job_id, frames=1)
                hung = running_engine(worker)
                with stopped(hung):
                    recoveries.append(client.seconds_until_running(job_id))
                    assert not hung.is_running()
                job = client.ended(job_id)
                assert (job["status"], job["attempt"]) == ("succeeded", 2), job
                next_job_succeeds(client, clip(5))
            row.runs += 1
    row.slowest("recovery", recoveries, limit_seconds=STALL_SECONDS + LATE_SECONDS)


@pytest.mark.row(7, "forward pass hangs, the job's limit is first")
def test_a_job_whose_forward_pass_hangs_ends_at_its_limit(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    times = []
    with one_worker(rig) as worker:
        rig.learn(clip(5))
        for _ in range(scale.of(quick=1, full=2)):
            with rig.trial() as client:
                began_at = time.monotonic()
                job_id = client.accepted(clip(FRAMES))
                client.running(job_id, frames=1)
                with stopped(running_engine(worker)):
                    job = client.ended(job_id)
                    times.append(time.monotonic() - began_at)
                    assert (job["status"], job["error"]["code"]) == ("failed", "job_timeout"), job
                    next_job_succeeds(client, clip(5))
            row.runs += 1
    row.slowest("end", times, limit_seconds=JOB_SECONDS + LATE_SECONDS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video whose single frames take more memory than an engine has at hand after small ones."""
    path = tmp_path_factory.mktemp("large") / "clip.mp4"
    return write_video(path, moving_square(4, width=LARGE[0], height=LARGE[1]))


@pytest.mark.row(7, "out of memory, once")
def test_an_engine_without_memory_is_replaced(
    rig: Rig, clip: Callable[[int], Path], large: Path, scale: Scale, row: Row
) -> None:
    recoveries = []
    with one_worker(rig) as worker:
        rig.learn(large)
        rig.learn(clip(5))
        for _ in range(scale.of(quick=1, full=3)):
            with rig.trial() as client:
                # The one that has worked at the large video holds enough memory for it.
                kill(running_engine(worker))
                next_job_succeeds(client, clip(5))
                starved = running_engine(worker)
                starve(starved, limit_bytes=peak_bytes(starved) + SPARE_BYTES)
                job_id = client.accepted(large)
                recoveries.append(client.seconds_until_running(job_id))
                assert not starved.is_running()
                job = client.ended(job_id)
                assert (job["status"], job["attempt"]) == ("succeeded", 2), job
                next_job_succeeds(client, clip(5))
            row.runs += 1
    row.slowest("recovery", recoveries, limit_seconds=LATE_SECONDS)


@pytest.mark.row(7, "out of memory, at every attempt")
def test_a_job_that_there_is_never_memory_for_fails_and_the_next_one_runs(
    rig: Rig, clip: Callable[[int], Path], large: Path, scale: Scale, row: Row
) -> None:
    with one_worker(rig) as worker:
        rig.learn(clip(5))
        first = running_engine(worker)
        starve(first, psutil.Process(worker.pid), limit_bytes=peak_bytes(first) + SPARE_BYTES)
        for _ in range(scale.of(quick=1, full=3)):
            with rig.trial() as client:
                job = client.ended(client.accepted(large))
                assert (job["status"], job["attempt"]) == ("failed", ATTEMPTS), job
                assert job["error"]["code"] == "engine_failed"
                next_job_succeeds(client, clip(5))
            row.runs += 1


@pytest.mark.gpu
@pytest.mark.row(7, "out of memory on the GPU")
def test_an_engine_without_memory_on_the_gpu_is_replaced(
    make_rig: Callable[..., Rig], clip: Callable[[int], Path], large: Path, cuda_device: str, row: Row
) -> None:
    import torch

    rig = make_rig(device=cuda_device)
    rig.start_api()
    worker = rig.start_worker()
    rig.learn(large)
    rig.learn(clip(5))
    with rig.trial() as client:
        kill(running_engine(worker))
        next_job_succeeds(client, clip(5))
        starved = running_engine(worker)
        ballast = torch.empty(0, dtype=torch.uint8, device=cuda_device)
        free_bytes, _ = torch.cuda.mem_get_info()
        ballast.resize_(free_bytes - 32 * 2**20)
        job_id = client.accepted(large)
        wait_until_gone([starved])
        del ballast
        torch.cuda.empty_cache()
        rig.replace_the_dead()
        assert client.ended(job_id, within_seconds=120)["status"] == "succeeded"
        next_job_succeeds(client, clip(5))
    row.runs += 1
