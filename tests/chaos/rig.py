"""A running service under fault: its own Redis, workers that are replaced, clients that record."""

import hashlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from service.cli.up import free_port
from tests.chaos.client import Client, identity
from tests.chaos.faults import Worker, horse
from tests.chaos.history import History
from tests.chaos.invariants import (
    backward_moves,
    differing_downloads,
    leftovers,
    require,
    unexcused_errors,
    unfinished_jobs,
    wrongly_published,
)
from tests.chaos.redis_server import RedisServer
from tests.integration.conftest import Stack, eventually

LEASE_SECONDS = 3
SPAN_FRAMES = 8
_SETTLE_SECONDS = 30  # what the dead have left half-made is swept 11 s later


def small_and_alert(weights: Path) -> dict[str, str]:
    """Environment of a service with a tiny network that soon notices a death and saves its work often."""
    return {
        "IMCNET_WEIGHTS": str(weights),
        "IMCNET_DEVICE": "cpu",
        "IMCNET_INPUT_SIZE": "32",
        "IMCNET_CPU_THREADS": "1",
        "IMCNET_DISK_RESERVE_BYTES": "0",
        "IMCNET_LEASE_SECONDS": str(LEASE_SECONDS),
        "IMCNET_RECONCILE_SECONDS": "0.5",
        "IMCNET_SWEEP_INTERVAL_SECONDS": "1",
        "IMCNET_UPLOAD_IDLE_SECONDS": "3",
        "IMCNET_PROBE_TIMEOUT_SECONDS": "5",
        "IMCNET_SPAN_FRAMES": str(SPAN_FRAMES),
        "OMP_NUM_THREADS": "1",
    }


def new_rig(directory: Path, weights: Path, **settings: object) -> "Rig":
    """A rig of a running Redis and nothing else yet; settings by name, for all of its processes."""
    server = RedisServer(directory / "redis")
    server.start()
    return Rig(
        directory=directory,
        environment={
            **small_and_alert(weights),
            "IMCNET_REDIS_URL": server.url,
            "IMCNET_DATA_DIR": str(directory / "data"),
            **{f"IMCNET_{name.upper()}": str(value) for name, value in settings.items()},
        },
        output=(directory / "log").open("ab"),
        server=server,
    )


@dataclass(frozen=True, kw_only=True)
class _Hire:
    """A worker and how it was started, so that another one can take its place."""

    worker: Worker
    settings: Mapping[str, object]


@dataclass(kw_only=True)
class Rig(Stack):
    """A stack that a test may do anything to, and that can be put together again.

    Settings are given by name, as those of :class:`Stack`; ``environment`` adds variables as they are.

    Attributes:
        server: The Redis.
        references: The SHA-256 of ``masks.zip`` by what was sent, from undisturbed runs.
        history: What the clients saw in the current trial.
    """

    server: RedisServer
    references: dict[str, str] = field(default_factory=dict)
    history: History = field(default_factory=History)
    _api_settings: Mapping[str, object] = field(default_factory=dict)
    _api: "subprocess.Popen[bytes] | None" = None
    _hires: list[_Hire] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10, trust_env=False, verify=False)

    # -- processes ---------------------------------------------------------------------------------------

    @property
    def api(self) -> "subprocess.Popen[bytes]":
        assert self._api is not None, "the API has not been started"
        return self._api

    @property
    def living_workers(self) -> list[Worker]:
        return [hire.worker for hire in self._hires if hire.worker.poll() is None]

    def start_api(self, **settings: object) -> "subprocess.Popen[bytes]":
        """Start the API, or start it again on the same port."""
        self.port = self.port or free_port()
        self._api_settings = settings
        self._api = self.start("serve", "--port", str(self.port), **settings)
        eventually(self._answers, within_seconds=60, what="the API answers")
        return self._api

    def launch_worker(self, **settings: object) -> Worker:
        """Start a worker and do not wait for it."""
        worker = self.start("worker", **settings)
        self._hires.append(_Hire(worker=worker, settings=settings))
        return worker

    def start_worker(self, **settings: object) -> Worker:
        return self.start_workers(1, **settings)[0]

    def start_workers(self, count: int, **settings: object) -> list[Worker]:
        """Start some workers at once and wait until all are ready."""
        before = self._worker_names()
        started = [self.launch_worker(**settings) for _ in range(count)]
        eventually(
            lambda: len(self._worker_names() - before) >= count,
            within_seconds=90,
            what=f"{count} workers are ready",
        )
        return started

    def replace_the_dead(self) -> None:
        """Start again whatever was killed, as a supervisor would; returns when all of it is ready."""
        self.restart_front()
        self.relaunch_dead_workers()
        eventually(
            lambda: len(self._worker_names()) >= len(self.living_workers),
            within_seconds=90,
            what="the dead are replaced",
        )

    def restart_front(self) -> None:
        """Start API and Redis again if they are dead; returns when they answer."""
        if not self.server.is_alive:
            self.server.start()
        if self.api.poll() is not None:
            self.start_api(**self._api_settings)
        eventually(self._is_ready, within_seconds=30, what="the API is ready")

    def relaunch_dead_workers(self) -> None:
        """Start them again and do not wait for them."""
        for hire in [hire for hire in self._hires if hire.worker.poll() is not None]:
            self._hires.remove(hire)
            self.processes.remove(hire.worker)
            self.launch_worker(**hire.settings)

    def dismiss(self, worker: Worker) -> None:
        """End a worker for good."""
        self._hires = [hire for hire in self._hires if hire.worker is not worker]
        worker.terminate()
        worker.wait(timeout=30)

    def worker_at_work(self, *, within_seconds: float = 20) -> Worker:
        """A worker that is at a job."""
        return eventually(
            lambda: next((worker for worker in self.living_workers if horse(worker)), None),
            within_seconds=within_seconds,
            what="a worker is at a job",
        )

    def stop(self) -> None:
        super().stop()
        self.server.stop()
        if self.output is not None:
            self.output.close()

    def _is_ready(self) -> bool:
        with self.client as client:
            return client.get("/readyz").is_success

    def _worker_names(self) -> set[str]:
        try:
            return {worker["name"] for worker in self.workers() or ()}
        except httpx.HTTPError:
            return set()

    # -- trials ------------------------------------------------------------------------------------------

    def learn(self, video: Path, **options: object) -> None:
        """Let a job run undisturbed, and take its archive as the reference of all that are sent the same.

        Once is enough: from then on this does nothing. Call it while all is well.
        """
        if identity(video, **options) in self.references:
            return
        with Client(History(), self.url) as client:
            job_id = client.post(video, **options)
            assert job_id is not None, "the upload was refused"
            job = client.ended(job_id, within_seconds=120)
            assert (job["status"], job["attempt"]) == ("succeeded", 1), job
            archive = client.download(job_id)
            assert archive is not None
            client.delete(job_id)
        self.references[identity(video, **options)] = hashlib.sha256(archive).hexdigest()

    def new_client(self, name: str) -> Client:
        """One more client of the current trial, for a thread of its own."""
        return Client(self.history, self.url, name=name)

    @contextmanager
    def trial(self) -> Iterator[Client]:
        """A client whose history, and what it leaves behind, satisfy all invariants at the end of the block.

        By then every job has to have been seen to its end, and everything has to be running again. If
        anything fails, the history is written to a file that the error names, and for the next trial the dead
        are replaced and the jobs removed.
        """
        self.history = History()
        try:
            with self.new_client("client") as client:
                yield client
                self._verify(client)
        except BaseException as error:
            path = self.directory / f"history-{time.monotonic_ns()}.jsonl"
            self.history.dump(path)
            error.add_note(f"history of the clients: {path}\nlog of the service: {self.directory / 'log'}")
            self.replace_the_dead()
            self._clear()
            raise

    def _clear(self) -> None:
        """Take away the jobs of a trial that has failed: they are no business of the next one."""
        with self.new_client("broom") as client:
            for job_id in self.history.acknowledged:
                client.delete(job_id)

    def _verify(self, client: Client) -> None:
        """Raises: AssertionError: An invariant does not hold."""
        for job_id in self.history.acknowledged:
            job = client.job(job_id)
            if job is not None and job["status"] == "succeeded":
                client.download(job_id)
        require(unfinished_jobs(self.history))
        require(differing_downloads(self.history, self.references))
        _settles(lambda: wrongly_published(self.history, self.references, self.data_dir))
        for job_id in self.history.acknowledged:
            client.delete(job_id)
            client.job(job_id)
        _settles(lambda: leftovers(self.data_dir, self.server.client))
        require(backward_moves(self.history))
        require(unexcused_errors(self.history))


def _settles(look: Callable[[], list[str]]) -> None:
    """Wait until there are no violations. Raises: AssertionError: There still are some."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (violations := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    require(violations)
