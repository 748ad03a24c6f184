"""What `imcnet jobs` shows of jobs, from the files and, as far as it answers, from Redis."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from redis import Redis
from rq.utils import as_text

from service.broker import translated
from service.errors import JobNotFound
from service.jobs import Attempt, JobStatus, QueueState, describe, utc_now
from service.queue import JobQueue
from service.storage import JobStorage

Document = dict[str, Any]

_UNITS = (("d", 86_400), ("h", 3600), ("m", 60))


@dataclass(frozen=True, kw_only=True)
class JobLine:
    """A job in the list; ``unreadable`` is one whose files make no sense.

    None is what the job has not, or what is not known without Redis. ``worker`` is that of the last attempt
    of a job that has not ended; ``leased`` says whether it is at the job now.
    """

    id: str
    status: JobStatus | Literal["unreadable"]
    created_at: datetime | None = None
    attempt: int | None = None
    queue_position: int | None = None
    frames_done: int | None = None
    frames_total: int | None = None
    worker: str | None = None
    leased: bool | None = None
    error: str | None = None


def summarize(storage: JobStorage, queue: JobQueue | None, job_id: str) -> JobLine:
    """A job in one line. ``queue`` is None where Redis does not answer.

    Raises:
        JobGone: It has been removed meanwhile.
        QueueUnavailable: Redis does not answer any more.
    """
    try:
        record, attempts = storage.load(job_id), storage.attempts(job_id)
        outcome = storage.outcome(job_id)  # after the attempts, which it takes away
    except (JobNotFound, ValueError):  # the former: job.json is missing; of a job removed it is JobGone
        return JobLine(id=job_id, status="unreadable")
    last = attempts[-1] if attempts and outcome is None else None
    state, leased = None, None
    if queue is not None and (outcome is None or outcome.status is JobStatus.CANCELED):
        state = queue.state(job_id)
        leased = queue.is_leased(last.record.delivery) if last else state.leased
    job = describe(record, outcome, attempts, state, retention=timedelta(), root_path="")
    counted = job.status is JobStatus.SUCCEEDED or (job.status is JobStatus.RUNNING and state is not None)
    return JobLine(
        id=job_id,
        status=job.status,
        created_at=job.created_at,
        attempt=job.attempt,
        queue_position=job.queue_position,
        frames_done=job.progress.frames_done if counted else None,
        frames_total=job.progress.frames_total if counted else None,
        worker=last.record.worker if last else None,
        leased=leased,
        error=job.error.code if job.error else None,
    )


def table(lines: Sequence[JobLine]) -> str:
    """The jobs below each other, under a head."""
    head = ("JOB", "STATUS", "ATTEMPT", "AGE", "PLACE", "WORKER", "ERROR")
    rows = [head, *map(_cells, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cells(line: JobLine) -> tuple[str, ...]:
    return (
        line.id,
        line.status,
        "" if line.attempt is None else str(line.attempt),
        "" if line.created_at is None else age(line.created_at),
        _place(line),
        f"{line.worker or ''}{' (no lease)' if _is_silent(line) else ''}",
        line.error or "",
    )


def _place(line: JobLine) -> str:
    """Where in the queue, or how many frames are done."""
    match line.status:
        case JobStatus.QUEUED | JobStatus.RUNNING if line.leased is None:
            return "unknown"
        case JobStatus.QUEUED if line.queue_position is None:
            return "not in the queue"
        case JobStatus.QUEUED:
            return f"#{line.queue_position} in the queue"
        case JobStatus.RUNNING | JobStatus.SUCCEEDED:
            total = "?" if line.frames_total is None else line.frames_total
            return f"{line.frames_done}/{total} frames"
        case _:
            return ""


def _is_silent(line: JobLine) -> bool:
    return line.status is JobStatus.RUNNING and line.leased is False


def examine(storage: JobStorage, queue: JobQueue | None, redis: Redis, job_id: str) -> Document:
    """All that there is of a job, damaged or not.

    Raises:
        JobGone: It has been removed meanwhile.
        QueueUnavailable: Redis does not answer any more.
    """
    directory = storage.source(job_id).parent
    spans = sorted(directory.glob("spans-*"))
    return {
        "id": job_id,
        "status": summarize(storage, queue, job_id).status,
        "directory": str(directory),
        "record": _as_far_as_readable(lambda: storage.load(job_id).model_dump(mode="json")),
        "attempts": _as_far_as_readable(
            lambda: [_attempt(attempt, queue) for attempt in storage.attempts(job_id)]
        ),
        "finished_spans": {path.name: sum(entry.is_dir() for entry in path.iterdir()) for path in spans},
        "outcome": _as_far_as_readable(lambda: _outcome(storage, job_id)),
        "file_bytes": _file_bytes(directory),
        "redis": None if queue is None else _redis_document(queue.state(job_id), redis, job_id),
    }


def outline(document: Document, indent: int = 0) -> str:
    """A document for people: a line for each value, deeper ones further to the right."""
    lines = []
    for key, value in document.items():
        inner = {f"{place}.": item for place, item in enumerate(value, 1)} if type(value) is list else value
        if isinstance(inner, dict) and inner:
            lines += [f"{' ' * indent}{key}", outline(inner, indent + 2)]
        else:
            lines.append(f"{' ' * indent}{key:<{max(1, 18 - indent)}} {_word(inner)}")
    return "\n".join(lines)


def age(since: datetime) -> str:
    """How long ago, in its two largest units."""
    seconds = max(0, int((utc_now() - since).total_seconds()))
    for place, (unit, size) in enumerate(_UNITS):
        if seconds >= size:
            finer, finer_size = _UNITS[place + 1] if place + 1 < len(_UNITS) else ("s", 1)
            return f"{seconds // size}{unit} {seconds % size // finer_size}{finer}"
    return f"{seconds}s"


def line_document(line: JobLine) -> Document:
    return asdict(line) | {"created_at": line.created_at.isoformat() if line.created_at else None}


def _as_far_as_readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (JobNotFound, ValueError) as error:
        return f"damaged: {' '.join(str(error).split())}"


def _attempt(attempt: Attempt, queue: JobQueue | None) -> Document:
    lives = attempt.end is None
    return {
        "number": attempt.number,
        "started_at": attempt.record.started_at.isoformat(),
        "worker": attempt.record.worker,
        "delivery": attempt.record.delivery,
        "end": attempt.end,
        "leased": queue.is_leased(attempt.record.delivery) if lives and queue is not None else None,
    }


def _outcome(storage: JobStorage, job_id: str) -> Document | None:
    outcome = storage.outcome(job_id)
    return None if outcome is None else outcome.model_dump(mode="json")


def _file_bytes(directory: Path) -> dict[str, int]:
    """Sizes of the files in a job's directory, and of whole folders where they are deeper than its own."""
    sizes: Counter[str] = Counter()
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):  # a running job takes away as it goes
                sizes["/".join(path.relative_to(directory).parts[:2])] += path.stat().st_size
    return dict(sorted(sizes.items()))


def _redis_document(state: QueueState, redis: Redis, job_id: str) -> Document:
    return {
        "queue_position": state.position,
        "leased": state.leased,
        "progress": state.progress.model_dump(mode="json"),
        "keys": _keys(redis, job_id),
    }


def _keys(redis: Redis, job_id: str) -> dict[str, str]:
    """Every key that names the job, with its type and the seconds that it has left."""
    found = {}
    with translated():
        for key in sorted(redis.scan_iter(f"*{job_id}*", count=1000)):
            seconds = redis.ttl(key)
            lasting = "stays" if seconds == -1 else f"{seconds} s left"
            found[as_text(key)] = f"{as_text(redis.type(key))}, {lasting}"
    return found


def _word(value: Any) -> str:
    if value is None or value in ([], {}):
        return "-"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
