"""What the clients of a service saw: every call, when it was made and what came of it."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Result = Literal["ok", "failed", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of one client, from ``began_at`` to ``ended_at`` (monotonic seconds).

    ``ok`` is an answer of 2xx or 3xx, ``failed`` any other; ``unknown``: no answer came, so the call may or
    may not have had its effect. ``sent`` identifies the video and options of an upload, ``received`` is the
    SHA-256 of a complete download. The job is described as the answer showed it.
    """

    client: str
    method: str
    path: str
    began_at: float
    ended_at: float
    result: Result
    status_code: int | None = None
    job_id: str | None = None
    job_status: str | None = None
    attempt: int | None = None
    frames_done: int | None = None
    sent: str | None = None
    received: str | None = None

    @property
    def acknowledges(self) -> bool:
        """Whether this is the 202 that promises a job."""
        return (self.method, self.path, self.status_code) == ("POST", "/jobs", 202)

    @property
    def removes(self) -> bool:
        """Whether the job is gone from here on, for sure."""
        return self.method == "DELETE" and self.result == "ok"


@dataclass(frozen=True, kw_only=True)
class Window:
    """While a fault was at work, which a test has announced."""

    fault: str
    began_at: float
    ended_at: float


class History:
    """Calls and faults in the order in which they ended. Any number of threads may write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._windows: list[Window] = []

    def add(self, call: Call) -> None:
        with self._lock:
            self._calls.append(call)

    @contextmanager
    def during(self, fault: str) -> Iterator[None]:
        """Announce that calls may go unanswered, or be answered with 5xx, within this block."""
        began_at = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._windows.append(Window(fault=fault, began_at=began_at, ended_at=time.monotonic()))

    @property
    def calls(self) -> tuple[Call, ...]:
        with self._lock:
            return tuple(self._calls)

    @property
    def windows(self) -> tuple[Window, ...]:
        with self._lock:
            return tuple(self._windows)

    @property
    def acknowledged(self) -> dict[str, str]:
        """The jobs that the service has promised: id → what was sent. The order is that of the answers."""
        return {call.job_id: call.sent or "" for call in self.calls if call.acknowledges and call.job_id}

    def dump(self, path: Path) -> None:
        """Write everything as JSON lines."""
        lines = (json.dumps(asdict(entry)) for entry in (*self.calls, *self.windows))
        path.write_text("".join(f"{line}\n" for line in lines))
