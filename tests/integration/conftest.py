"""The real thing: an API and workers as processes of their own, on a real Redis."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx
import pytest
from redis import Redis

from service.processes import tethered
from tests.conftest import REPOSITORY

T = TypeVar("T")


def eventually(look: Callable[[], T | None], *, within_seconds: float, what: str) -> T:
    """What ``look`` finds, as soon as it finds something."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {within_seconds} s")


@dataclass
class Stack:
    """A running service, and what a test may do to it. Its processes write to ``output``, if it is given."""

    directory: Path
    environment: Mapping[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0
    output: IO[bytes] | None = None

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    def start(
        self, *arguments: str, environment: Mapping[str, str] | None = None, **settings: object
    ) -> subprocess.Popen[bytes]:
        """Start ``imcnet`` with these arguments; settings by name, without their prefix, in lower case."""
        given = {f"IMCNET_{name.upper()}": str(value) for name, value in settings.items()}
        process = subprocess.Popen(
            tethered([sys.executable, "-P", "-m", "service.cli", *arguments]),
            env={**os.environ, **self.environment, **(environment or {}), **given},
            cwd=REPOSITORY,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def start_api(self, **settings: object) -> subprocess.Popen[bytes]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        process = self.start("serve", "--port", str(self.port), **settings)
        eventually(self._answers, within_seconds=30, what="the API answers")
        return process

    def start_worker(self, **settings: object) -> subprocess.Popen[bytes]:
        before = {worker["name"] for worker in self.workers()}
        process = self.start("worker", **settings)
        eventually(
            lambda: {worker["name"] for worker in self.workers()} - before,
            within_seconds=90,
            what="the worker is ready",
        )
        return process

    def workers(self) -> list[dict[str, Any]]:
        with self.client as client:
            workers: list[dict[str, Any]] = client.get("/version").raise_for_status().json()["workers"]
            return workers

    def post(self, video: Path, **options: object) -> dict[str, Any]:
        with self.client as client, open(video, "rb") as file:
            answer = client.post("/jobs", files={"video": (video.name, file)}, data=options)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        with self.client as client:
            job: dict[str, Any] = client.get(f"/jobs/{job_id}").raise_for_status().json()
            return job

    def ended(self, job_id: str, *, within_seconds: float = 120) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in ("succeeded", "failed", "canceled") else None

        return eventually(look, within_seconds=within_seconds, what=f"job {job_id} ends")

    def running(self, job_id: str, *, frames: int = 1) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            assert job["status"] in ("queued", "running"), job
            return job if job["progress"]["frames_done"] >= frames else None

        return eventually(look, within_seconds=60, what=f"job {job_id} runs")

    def download(self, job_id: str, name: str = "masks.zip") -> bytes:
        with self.client as client:
            return client.get(f"/jobs/{job_id}/artifacts/{name}").raise_for_status().content

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _answers(self) -> bool:
        try:
            with self.client as client:
                return client.get("/livez").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def stack(tmp_path: Path, redis: Redis, redis_url: str, untrained_weights: Path) -> Iterator[Stack]:
    """Nothing runs yet; the network is small and untrained, leases are short."""
    stack = Stack(
        directory=tmp_path,
        environment={
            "IMCNET_REDIS_URL": redis_url,
            "IMCNET_DATA_DIR": str(tmp_path / "data"),
            "IMCNET_WEIGHTS": str(untrained_weights),
            "IMCNET_INPUT_SIZE": "64",
            "IMCNET_CPU_THREADS": "1",
            "IMCNET_DISK_RESERVE_BYTES": "0",
            "IMCNET_LEASE_SECONDS": "6",
            "IMCNET_RECONCILE_SECONDS": "1",
        },
    )
    yield stack
    stack.stop()
