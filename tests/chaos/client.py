"""A client of the service whose every call goes into a history."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx

from tests.chaos.history import Call, History, Result

TERMINAL = frozenset({"succeeded", "failed", "canceled"})
_POLL_SECONDS = 0.1


class Client:
    """One client; each thread needs its own.

    A call that fails or goes unanswered is no error here: with faults about, that is for the test to judge.
    """

    def __init__(
        self, history: History, url: str, *, name: str = "client", timeout_seconds: float = 30
    ) -> None:
        self._history = history
        self._name = name
        self._http = httpx.Client(base_url=url, timeout=timeout_seconds, trust_env=False, verify=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    @property
    def acknowledged(self) -> dict[str, str]:
        """As :attr:`History.acknowledged`, of all clients."""
        return self._history.acknowledged

    # -- calls -------------------------------------------------------------------------------------------

    def call(
        self, method: str, path: str, *, job_id: str | None = None, sent: str | None = None, **content: Any
    ) -> httpx.Response | None:
        """Any call at all; None where no complete answer came."""
        began_at = time.monotonic()
        try:
            answer = self._http.request(method, path, **content)
        except httpx.TransportError:
            answer = None
        job = _job_of(answer)
        self._history.add(
            Call(
                client=self._name,
                method=method,
                path=path,
                began_at=began_at,
                ended_at=time.monotonic(),
                result=_result(answer),
                status_code=None if answer is None else answer.status_code,
                job_id=job.get("id", job_id),
                job_status=job.get("status"),
                attempt=job.get("attempt"),
                frames_done=job.get("progress", {}).get("frames_done"),
                sent=sent,
                received=_download_sha256(path, answer),
            )
        )
        return answer

    def post(self, video: Path, *, headers: dict[str, str] | None = None, **options: object) -> str | None:
        """Upload a video; the id of the job, or None where it was not acknowledged."""
        files = {"video": (video.name, video.read_bytes())}
        answer = self.call(
            "POST", "/jobs", sent=identity(video, **options), files=files, data=options, headers=headers
        )
        return str(answer.json()["id"]) if answer is not None and answer.status_code == 202 else None

    def accepted(self, video: Path, **options: object) -> str:
        """The id of a job that has to be acknowledged."""
        job_id = self.post(video, **options)
        assert job_id is not None, f"the upload was not accepted: {self._history.calls[-1]}"
        return job_id

    def job(self, job_id: str) -> dict[str, Any] | None:
        answer = self.call("GET", f"/jobs/{job_id}", job_id=job_id)
        return _job_of(answer) or None

    def download(self, job_id: str, name: str = "masks.zip") -> bytes | None:
        answer = self.call("GET", f"/jobs/{job_id}/artifacts/{name}", job_id=job_id)
        return answer.content if answer is not None and answer.status_code == 200 else None

    def cancel(self, job_id: str) -> bool:
        """Whether the call was answered well; the job may have ended before."""
        answer = self.call("POST", f"/jobs/{job_id}/cancel", job_id=job_id)
        return answer is not None and answer.is_success

    def delete(self, job_id: str) -> bool:
        answer = self.call("DELETE", f"/jobs/{job_id}", job_id=job_id)
        return answer is not None and answer.is_success

    # -- waiting -----------------------------------------------------------------------------------------

    def watch(
        self, job_id: str, until: Callable[[dict[str, Any]], object], *, within_seconds: float, what: str
    ) -> dict[str, Any]:
        """Look at a job again and again until it is as wanted.

        Raises:
            AssertionError: It has ended otherwise, or is not so in time.
        """
        deadline = time.monotonic() + within_seconds
        job = None
        while time.monotonic() < deadline:
            job = self.job(job_id) or job
            if job is not None and until(job):
                return job
            assert job is None or job["status"] not in TERMINAL, f"{what}: the job has ended: {job}"
            time.sleep(_POLL_SECONDS)
        raise AssertionError(f"{what}: not within {within_seconds:.0f} s; the job was last seen as {job}")

    def ended(self, job_id: str, *, within_seconds: float = 60) -> dict[str, Any]:
        return self.watch(
            job_id,
            lambda job: job["status"] in TERMINAL,
            within_seconds=within_seconds,
            what=f"job {job_id} ends",
        )

    def running(self, job_id: str, *, frames: int = 0, attempt: int = 1) -> dict[str, Any]:
        """The job as soon as it runs, in this attempt or a later one, and has done so many frames in all.

        Raises:
            AssertionError: It has ended before.
        """
        return self.watch(
            job_id,
            lambda job: (
                job["status"] == "running"
                and job["attempt"] >= attempt
                and job["progress"]["frames_done"] >= frames
            ),
            within_seconds=60,
            what=f"attempt {attempt} at job {job_id} has done {frames} frames",
        )

    def seconds_until_running(self, job_id: str, *, attempt: int = 2) -> float:
        began_at = time.monotonic()
        self.running(job_id, attempt=attempt)
        return time.monotonic() - began_at


def identity(video: Path, **options: object) -> str:
    """What two uploads have in common from which equal masks are to come."""
    digest = hashlib.sha256(video.read_bytes())
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _result(answer: httpx.Response | None) -> Result:
    if answer is None:
        return "unknown"
    return "ok" if answer.status_code < 400 else "failed"


def _job_of(answer: httpx.Response | None) -> dict[str, Any]:
    """The job that an answer shows; empty where it shows none."""
    if answer is None or not answer.content or answer.headers.get("content-type") != "application/json":
        return {}
    content = answer.json()
    return content if isinstance(content, dict) and "progress" in content else {}


def _download_sha256(path: str, answer: httpx.Response | None) -> str | None:
    if answer is None or answer.status_code != 200 or "/artifacts/" not in path:
        return None
    return hashlib.sha256(answer.content).hexdigest()
