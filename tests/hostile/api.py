"""A private API on a private Redis, and what each upload costs it."""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from service.embedded import EmbeddedRedis
from tests.integration.conftest import Stack

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an upload got, and what it took: peaks of resident memory while it was being answered."""

    status: int
    code: str | None
    body: str
    job_id: str | None
    seconds: float
    probe_bytes: int
    api_bytes: int


class Api:
    """Posts files to a running API."""

    def __init__(self, stack: Stack, pid: int) -> None:
        self.stack = stack
        self._client = stack.client
        self._process = psutil.Process(pid)

    @property
    def resident_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    @property
    def peak_bytes(self) -> int:
        """The most that has been resident since :meth:`forget_the_peak`."""
        return _peak_bytes(self._process.pid)

    def forget_the_peak(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def is_alive(self) -> bool:
        return self._process.is_running() and self._client.get("/livez").status_code == 200

    def post(self, video: Path, *, filename: str = "upload") -> Answer:
        self.forget_the_peak()
        began = time.monotonic()
        with _PeakOfChildren(self._process) as probe, open(video, "rb") as file:
            answer = self._client.post("/jobs", files={"video": (filename, file)})
        seconds = time.monotonic() - began
        body = answer.json()
        return Answer(
            status=answer.status_code,
            code=body.get("code"),
            body=answer.text,
            job_id=body.get("id"),
            seconds=seconds,
            probe_bytes=probe.bytes,
            api_bytes=self.peak_bytes,
        )

    def close(self) -> None:
        self._client.close()


class _PeakOfChildren(threading.Thread):
    """The largest peak that any child process reaches for as long as the context lasts."""

    def __init__(self, parent: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._parent = parent
        self._over = threading.Event()

    def __enter__(self) -> "_PeakOfChildren":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.01):
            for child in self._parent.children():
                self.bytes = max(self.bytes, _peak_bytes(child.pid))


def _peak_bytes(pid: int) -> int:
    """The peak of a process's resident memory; 0 if it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(found[1]) if found else 0


@contextmanager
def private_api(directory: Path, *, silent: bool = False, **settings: object) -> Iterator[Api]:
    """Start both, with settings by name; end both. ``silent``: what they print goes to a file."""
    with (
        ExitStack() as resources,
        pytest.MonkeyPatch.context() as patch,
        EmbeddedRedis(directory / "redis") as redis,
    ):
        for name in [*os.environ]:
            if name.startswith("IMCNET_") and name != "IMCNET_TEST_DATA":
                patch.delenv(name)
        environment = {
            "IMCNET_REDIS_URL": redis.url,
            "IMCNET_DATA_DIR": str(directory / "data"),
            "IMCNET_DISK_RESERVE_BYTES": "0",
            "IMCNET_MAX_QUEUED_JOBS": "1000",
        }
        stack = Stack(directory=directory, environment=environment)
        if silent:
            stack.output = resources.enter_context(open(directory / "output", "wb"))
        try:
            process = stack.start_api(**settings)
            api = Api(stack, process.pid)
            yield api
            api.close()
        finally:
            stack.stop()
