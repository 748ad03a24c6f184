"""What happens to a job, for those who watch: a capped stream per job, whose ids serve as SSE ids.

Nothing here is decisive: a watcher that has missed something looks the job up.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from redis import Redis
from redis.client import Pipeline

from service.broker import translated
from service.jobs import JobStatus

BEGINNING = "0-0"
"""Before every event."""

EventKind = Literal["status", "progress"]

_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


@dataclass(frozen=True, kw_only=True)
class Event:
    """``data`` is JSON: a :class:`StatusChange`, or the ``Progress`` of the API."""

    id: str
    kind: EventKind
    data: str


class StatusChange(BaseModel):
    """The job has got this status, with its ``attempt``-th attempt or after it."""

    status: JobStatus
    attempt: int


def is_event_id(text: str) -> bool:
    """Whether ``text`` could be the id of an event."""
    match = _ID.fullmatch(text)
    return match is not None and all(int(number) < 2**64 for number in match.groups())


class JobEvents:
    """The latest events of every job. All methods raise QueueUnavailable where Redis cannot be reached.

    Args:
        max_events: How many are kept of a job.
    """

    def __init__(self, connection: Redis, *, max_events: int = 1000) -> None:
        self._redis = connection
        self._max_events = max_events

    @staticmethod
    def key_of(job_id: str) -> str:
        return f"imcnet:events:{job_id}"

    def append(self, job_id: str, kind: EventKind, data: str, *, pipeline: Pipeline | None = None) -> None:
        """Add an event: now, or as a part of ``pipeline``, which the caller executes."""
        client = self._redis if pipeline is None else pipeline
        with translated():
            client.xadd(
                self.key_of(job_id), {"kind": kind, "data": data}, maxlen=self._max_events, approximate=False
            )

    def after(self, job_id: str, last_id: str, *, count: int) -> list[Event]:
        """The oldest ``count`` of the events after ``last_id`` that are still kept."""
        with translated():
            entries = self._redis.xrange(self.key_of(job_id), min=f"({last_id}", count=count)
        return [_event(entry) for entry in entries or ()]

    def newest_id(self, job_id: str) -> str:
        """The id of the last event; :data:`BEGINNING` where there is none."""
        with translated():
            entries = self._redis.xrevrange(self.key_of(job_id), count=1)
        return _event(entries[0]).id if entries else BEGINNING

    def delete(self, job_id: str) -> None:
        with translated():
            self._redis.delete(self.key_of(job_id))


def _event(entry: tuple[Any, Any]) -> Event:
    event_id, fields = entry
    return Event(id=event_id.decode(), kind=fields[b"kind"].decode(), data=fields[b"data"].decode())
