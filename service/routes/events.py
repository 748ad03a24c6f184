"""``/jobs/{id}/events``: what happens to a job, as Server-Sent Events."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Header, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from service.errors import JobGone, JobNotFound, QueueUnavailable, StorageUnavailable, Unauthorized
from service.events import BEGINNING, Event, StatusChange, is_event_id
from service.jobs import Job, Progress
from service.keys import ApiKey
from service.problems import documented
from service.services import KeyDep, Services, ServicesDep

_POLL_SECONDS = 0.5
_QUIET_SECONDS = 10.0  # after which the job is looked up, and a proxy needs a sign of life
_EVENTS_AT_ONCE = 1000
_END = "end"  # kind and id of the last event: a client that names it has seen all

_LOOKS_AT_ONCE = CapacityLimiter(16)  # should Redis hang, those who watch wait for each other and nobody else

_EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["status", "progress", _END]},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "id": {"type": "string"},
    },
}

router = APIRouter()


@router.get(
    "/jobs/{job_id}/events",
    response_class=Response,
    responses={
        200: {"description": "The events.", "content": {"text/event-stream": {"itemSchema": _EVENT}}},
        204: {"description": "The client has seen the end."},
        **documented("job_not_found", "job_gone", "queue_unavailable"),
    },
)
async def watch_job(
    services: ServicesDep,
    key: KeyDep,
    job_id: str,
    last_event_id: Annotated[
        str | None, Header(description="The last event that the client has seen; the next ones follow.")
    ] = None,
) -> Response:
    """Watch the job.

    `status` is the job, as it was when its status changed; `progress` is the job's progress; `end` is the job
    when it has ended, and the last event. Without `Last-Event-ID` the first one is a `status` of now.
    """
    watch = _Watch(services, key, job_id)
    beginning = await to_thread.run_sync(watch.begin, last_event_id)
    if watch.ended:
        return Response(status_code=204)
    return EventSourceResponse(
        _stream(services, watch, beginning),
        # The latter is for nginx, which would wait until it has a buffer full of events.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _stream(services: Services, watch: "_Watch", beginning: bytes) -> AsyncIterator[bytes]:
    clock = asyncio.get_running_loop().time
    yield beginning
    told_at = clock()
    while not (watch.ended or services.stopping.is_set()):
        look = partial(watch.news, quiet=clock() - told_at >= _QUIET_SECONDS)
        try:
            news = await to_thread.run_sync(look, limiter=_LOOKS_AT_ONCE)
        except (JobNotFound, JobGone, Unauthorized, StorageUnavailable):
            return  # whoever asks again is told so
        if news:
            yield news
            told_at = clock()
        if not watch.ended:
            await asyncio.sleep(_POLL_SECONDS)


class _Watch:
    """What one client has been told of a job. The methods block; they return what is to be told next."""

    def __init__(self, services: Services, key: ApiKey | None, job_id: str) -> None:
        self._services = services
        self._key = key
        self._job_id = job_id
        self._position = BEGINNING
        self._told: Job | None = None
        self.ended = False

    def begin(self, last_event_id: str | None) -> bytes:
        """Raises: JobNotFound, JobGone, QueueUnavailable."""
        try:
            self._position = self._services.queue.events.newest_id(self._job_id)
        except QueueUnavailable:
            if not self._services.storage.has_ended(self._job_id):
                raise
        job = self._services.job(self._job_id)
        if last_event_id == _END and job.status.terminal:
            self.ended = True
            return b""
        if last_event_id is not None and is_event_id(last_event_id):
            self._position = last_event_id
            return b""
        return self._status(job, event_id=self._position)

    def news(self, *, quiet: bool) -> bytes:
        """``quiet``: there was nothing for so long that something should be said, if only a comment.

        Raises:
            JobNotFound, JobGone: The job was removed.
            Unauthorized: The key was revoked.
            StorageUnavailable: Whether it was, cannot be told.
        """
        self._services.check_key(self._key)
        sign_of_life = KEEPALIVE_COMMENT if quiet else b""
        try:
            return self._news(look_up=quiet) or sign_of_life
        except QueueUnavailable:
            return sign_of_life

    def _news(self, *, look_up: bool) -> bytes:
        has_ended = self._services.storage.has_ended(self._job_id)  # asked before the last events are read
        events = self._unseen(has_ended=has_ended)
        look_up = look_up or has_ended or any(event.kind == "status" for event in events)
        job = self._services.job(self._job_id) if look_up else None
        news = [self._encoded(event, job) for event in events]
        if events:
            self._position = events[-1].id
        if job is not None and len(events) < _EVENTS_AT_ONCE:
            news.append(self._end(job) if has_ended and job.status.terminal else self._change(job))
        return b"".join(news)

    def _unseen(self, *, has_ended: bool) -> list[Event]:
        try:
            return self._services.queue.events.after(self._job_id, self._position, count=_EVENTS_AT_ONCE)
        except QueueUnavailable:
            if has_ended:
                return []  # how it ended is all that matters now
            raise

    def _encoded(self, event: Event, job: Job | None) -> bytes:
        if event.kind == "progress":
            return format_sse_event(event="progress", data_str=event.data, id=event.id)
        assert job is not None
        change = StatusChange.model_validate_json(event.data)
        return self._status(_as_of(change, job), event_id=event.id)

    def _change(self, job: Job) -> bytes:
        """What no event tells: that the job moves up in the queue, that it is being canceled."""
        return b"" if job.status.terminal or job == self._told else self._status(job)

    def _status(self, job: Job, *, event_id: str | None = None) -> bytes:
        self._told = job
        return format_sse_event(event="status", data_str=job.model_dump_json(), id=event_id)

    def _end(self, job: Job) -> bytes:
        self.ended = True
        return format_sse_event(event=_END, data_str=job.model_dump_json(), id=_END)


def _as_of(change: StatusChange, job: Job) -> Job:
    """The job as it was right after a change that others have followed, as far as that is known now."""
    if (job.status, job.attempt) == (change.status, change.attempt):
        return job
    return job.model_copy(
        update={
            "status": change.status,
            "attempt": change.attempt,
            "queue_position": None,
            "progress": Progress(),
            "artifacts": (),
            "error": None,
            "warnings": (),
            "timings": None,
            "model": None,
            "finished_at": None,
            "expires_at": None,
        }
    )
