"""`imcnet up` as a user has it: real API, worker, engine and Redis, stopped and killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.cli.up import free_port
from tests.videos import moving_square, write_video
from tests.waiting import wait_until, wait_until_gone

pytestmark = pytest.mark.processes


class Up:
    """A running `imcnet up`."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process = process
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        self.log = log

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return "is ready on" in self.log.read_text()

        wait_until(ready, timeout_seconds=120)

    def descendants(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        assert len(found) >= 4, "Redis, API, worker and engine"
        return found

    def child(self, word: str) -> psutil.Process:
        """The one child that was started with the argument ``word``, or whose title begins so."""
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if any(part == word or part.startswith(f"{word}:") for part in " ".join(child.cmdline()).split())
        ]
        return found

    def workers(self) -> dict[str, int]:
        """Name to engine of the workers that are announced."""
        answer = self.client.get("/version").json()
        return {worker["name"]: worker["engine_pid"] for worker in answer["workers"] or []}

    def post(self, video: Path) -> str:
        with video.open("rb") as file:
            answer = self.client.post("/jobs", files={"video": file})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.client.get(f"/jobs/{job_id}").json()
        return job

    def answers(self) -> bool:
        try:
            return self.client.get("/readyz").json()["redis"] is True
        except httpx.TransportError:
            return False


@contextmanager
def running(folder: Path, weights: Path, *, input_size: int = 64) -> Iterator[Up]:
    port, log = free_port(), folder / "log"
    environment = {
        **os.environ,
        "IMCNET_DATA_DIR": str(folder / "data"),
        "IMCNET_DISK_RESERVE_BYTES": "0",
        "IMCNET_INPUT_SIZE": str(input_size),
        "IMCNET_CPU_THREADS": "1",
    }
    command = [sys.executable, "-m", "service.cli", "up", "--port", str(port), "--device", "cpu"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--weights", str(weights)], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    up = Up(process, port, log)
    try:
        up.wait_until_ready()
        yield up
    finally:
        up.client.close()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", moving_square(24))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_it_in_the_middle_of_a_job(
    tmp_path: Path, untrained_weights: Path, video: Path, number: signal.Signals
) -> None:
    with running(tmp_path, untrained_weights, input_size=480) as up:
        job_id = up.post(video)
        wait_until(lambda: up.job(job_id)["progress"]["frames_done"] > 0)
        assert up.job(job_id)["status"] == "running"
        before = up.descendants()
        up.process.send_signal(number)
        assert up.process.wait(60) == (0 if number is signal.SIGINT else -number)
        wait_until_gone(before)


def test_what_dies_is_started_again(tmp_path: Path, untrained_weights: Path, video: Path) -> None:
    with running(tmp_path, untrained_weights) as up:
        redis = up.child("unixsocket")
        redis.kill()
        wait_until_gone([redis])
        wait_until(up.answers)

        up.child("serve").kill()
        wait_until(lambda: not up.answers())
        wait_until(up.answers)

        before = up.workers()
        up.child("worker").kill()
        wait_until(lambda: any(name not in before for name in up.workers()))

        job_id = up.post(video)
        wait_until(lambda: up.job(job_id)["status"] == "succeeded")


def test_a_job_that_was_not_done_is_done_after_a_restart(
    tmp_path: Path, untrained_weights: Path, video: Path
) -> None:
    with running(tmp_path, untrained_weights, input_size=480) as up:
        jobs = [up.post(video) for _ in range(2)]
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 0
    with running(tmp_path, untrained_weights) as up:
        wait_until(
            lambda: all(up.job(job_id)["status"] == "succeeded" for job_id in jobs), timeout_seconds=200
        )
