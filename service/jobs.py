"""The job contract: one type per concept, shared by the API, the storage and the worker.

``JobRecord`` is what was accepted (``job.json``), ``Attempt`` one go at it, ``Outcome`` how it ended
(``outcome.json``), ``QueueState`` what Redis knows in between. :func:`describe` makes of them the public
:class:`Job`.

What is stored may be read by a process of the release before or after the one that wrote it, so it is read by
:func:`read_stored`: fields that are not known are passed over, new ones have defaults, and a record that an
older release would get wrong says so by a higher ``version``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, computed_field

from service.errors import PROBLEMS, EngineFailed, ImcnetError, StorageFull, WorkerCrashed

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def utc_now() -> datetime:
    return datetime.now(UTC)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Stored = TypeVar("Stored", bound=BaseModel)


def read_stored(kind: type[Stored], path: Path) -> Stored:
    """Read what a process of this release, the one before or the one after has stored.

    Raises:
        FileNotFoundError: There is no such file.
        pydantic.ValidationError: It was made by neither.
    """
    return kind.model_validate_json(path.read_bytes(), extra="ignore")


class JobStatus(StrEnum):
    """``canceling``: the job is settled as canceled, but a worker is still letting go of it."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELING = "canceling"
    CANCELED = "canceled"

    @property
    def terminal(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED)


class ArtifactKind(StrEnum):
    """``masks``: ``masks.zip``, a PNG per frame. ``overlay``: ``overlay.mp4``, the video tinted."""

    MASKS = "masks"
    OVERLAY = "overlay"


Quality = Literal["fast", "exact", "multi_scale"]


def _each_once(kinds: tuple[ArtifactKind, ...]) -> tuple[ArtifactKind, ...]:
    return tuple(kind for kind in ArtifactKind if kind in kinds)


class JobOptions(_Model):
    """What a client may choose for a job."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="A pixel is foreground where its probability reaches this."
    )
    max_side: Annotated[int, Field(ge=16, le=8192)] | None = Field(
        default=None,
        description="Longest side of the masks in pixels; larger ones are scaled down. Default: no limit.",
    )
    quality: Quality = Field(
        default="exact",
        description="`exact`: one look at each frame. `fast`: the same in 16 bit, where the worker has an "
        "engine whose masks agree with the exact ones; else exact, with the warning `fast_unavailable`. "
        "`multi_scale`: the mean of nine looks, at three sizes and mirrored, which takes about twelve times "
        "as long.",
    )
    artifacts: Annotated[
        tuple[ArtifactKind, ...], Field(min_length=1, max_length=16), AfterValidator(_each_once)
    ] = Field(default=(ArtifactKind.MASKS,), description="What to produce.")


class VideoInfo(_Model):
    """What the probe learned of a video.

    ``width`` and ``height`` are pixels as displayed, after ``rotation`` (degrees clockwise). ``frames`` and
    ``duration_s`` (seconds) are the container's claims, null where it makes none.
    """

    width: int
    height: int
    rotation: Literal[0, 90, 180, 270]
    fps: float | None
    frames: int | None
    duration_s: float | None
    container: str
    codec: str


class JobInput(VideoInfo):
    """The accepted video. ``filename`` is the client's word and used for nothing but display."""

    filename: str | None
    bytes: int
    sha256: Sha256


class JobWarning(_Model):
    """Something the client should know although the job goes on or has succeeded."""

    code: str
    detail: str


class Problem(BaseModel):
    """An error as RFC 9457 has it, with a fixed ``code`` to tell errors apart by."""

    model_config = ConfigDict(frozen=True)

    type: str = "about:blank"
    title: str
    status: int | None = None
    detail: str
    code: str

    @classmethod
    def of(cls, error: ImcnetError) -> "Problem":
        status, title = PROBLEMS[error.code]
        return cls(title=title, status=status, detail=error.detail, code=error.code)


class Artifact(_Model):
    """A file that a succeeded job published."""

    name: str
    media_type: str
    bytes: int
    sha256: Sha256


class ModelInfo(_Model):
    """The network that ran, as its weights file describes it."""

    name: str
    backbone: str
    weights_sha256: Sha256
    trained: bool


class EngineInfo(_Model):
    """What computed the network: back end and precision, such as ``torch-float32``, on a kind of device."""

    name: str
    device: str
    quality: Quality | None = Field(
        default=None,
        description="The quality that ran: `exact` where `fast` could not be had. Null in older records.",
    )


class Timings(_Model):
    """Seconds; decoding, inference and encoding overlap, so they do not add up to the job's time."""

    queue_s: float
    decode_s: float
    inference_s: float
    encode_s: float


class JobRecord(_Model):
    """``job.json``: the accepted job, written and synced before the client gets its 202."""

    version: Annotated[int, Field(ge=1)] = 1
    id: str
    created_at: AwareDatetime
    options: JobOptions
    input: JobInput


class AttemptRecord(_Model):
    """``attempt.json``: who began an attempt. ``delivery`` names its lease in Redis."""

    version: Annotated[int, Field(ge=1)] = 1
    delivery: str
    worker: str
    started_at: AwareDatetime


class AttemptEnd(StrEnum):
    """Why an attempt ended without an outcome. A preempted one was given back, so it uses nothing up."""

    LOST = "lost"  # its lease ran out: the worker is dead, or was silent for too long
    CRASHED = "crashed"  # its process died or raised
    ENGINE_FAILED = "engine_failed"
    DAMAGED = "damaged"  # a finished span turned out to be damaged, and was thrown away
    STORAGE_FULL = "storage_full"  # and no room even for the outcome: no other attempt will do better
    PREEMPTED = "preempted"  # the worker was told to end


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An attempt at a job. While it lives, ``end`` is None and ``directory`` is its right to publish."""

    number: int
    end: AttemptEnd | None
    directory: Path
    record: AttemptRecord


class Outcome(_Model):
    """``outcome.json``: how a job ended. Created exclusively, so whoever comes second did not decide."""

    version: Annotated[int, Field(ge=1)] = 1
    status: Literal[JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED]
    finished_at: AwareDatetime
    started_at: AwareDatetime | None = None
    attempt: int = 0
    workspace: str | None = None
    frames: int | None = None
    artifacts: tuple[Artifact, ...] = ()
    error: Problem | None = None
    warnings: tuple[JobWarning, ...] = ()
    timings: Timings | None = None
    model: ModelInfo | None = None
    engine: EngineInfo | None = None


class Progress(_Model):
    """How far a running attempt is. ``frames_total`` is an estimate until all frames are decoded."""

    phase: Literal["waiting", "segmenting", "publishing", "done"] = "waiting"
    frames_done: int = 0
    frames_total: int | None = None
    fps: float | None = Field(default=None, description="Frames segmented per second, over this attempt.")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def percent(self) -> float | None:
        if not self.frames_total:
            return None
        return round(min(100.0, 100 * self.frames_done / self.frames_total), 1)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def eta_s(self) -> float | None:
        if not self.frames_total or not self.fps:
            return None
        return round(max(0, self.frames_total - self.frames_done) / self.fps, 1)


class WorkerInfo(_Model):
    """A living worker, as it announces itself. A new ``engine_pid`` means that the model was loaded anew."""

    name: str
    host: str
    device: str
    engine_pid: int
    load_s: float
    model: ModelInfo


@dataclass(frozen=True, kw_only=True)
class QueueState:
    """What the queue knows of a job. ``leased``: a worker is at it; ``position`` counts from 1."""

    leased: bool = False
    position: int | None = None
    progress: Progress = field(default_factory=Progress)
    workers_alive: int = 0


def failures(attempts: Sequence[Attempt]) -> int:
    """How many of the attempts are used up."""
    return sum(attempt.end not in (None, AttemptEnd.PREEMPTED) for attempt in attempts)


def is_lost_cause(attempts: Sequence[Attempt], *, max_attempts: int) -> bool:
    """Whether no further attempt is due."""
    last_end = attempts[-1].end if attempts else None
    return last_end is AttemptEnd.STORAGE_FULL or failures(attempts) >= max_attempts


def given_up(attempts: Sequence[Attempt]) -> Outcome:
    """The outcome of a job that no further attempt is due for, with what became of each."""
    ends = ", ".join(f"{attempt.number}: {attempt.end}" for attempt in attempts)
    diagnosis = f"No attempt at the job succeeded ({ends})."
    error: ImcnetError
    match attempts[-1].end:
        case AttemptEnd.STORAGE_FULL:
            error = StorageFull("The storage has no room for the masks.")
        case AttemptEnd.ENGINE_FAILED:
            error = EngineFailed(diagnosis)
        case _:
            error = WorkerCrashed(diagnosis)
    return Outcome(
        status=JobStatus.FAILED,
        attempt=attempts[-1].number,
        started_at=attempts[-1].record.started_at,
        finished_at=utc_now(),
        error=Problem.of(error),
    )


class PublishedArtifact(Artifact):
    url: str


class Links(_Model):
    """Paths below the service's root path."""

    self: str
    cancel: str
    artifacts: str


class Job(_Model):
    """The resource that ``/jobs`` and ``/jobs/{id}`` answer with. Times are RFC 3339 in UTC."""

    id: str
    status: JobStatus
    attempt: int
    queue_position: int | None = Field(description="1 is next; null unless queued.")
    progress: Progress
    input: JobInput
    options: JobOptions
    artifacts: tuple[PublishedArtifact, ...]
    error: Problem | None
    warnings: tuple[JobWarning, ...]
    timings: Timings | None
    model: ModelInfo | None
    engine: EngineInfo | None
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None
    expires_at: AwareDatetime | None
    links: Links


def describe(
    record: JobRecord,
    outcome: Outcome | None,
    attempts: Sequence[Attempt],
    state: QueueState | None,
    *,
    retention: timedelta,
    root_path: str,
) -> Job:
    """Make the public job of what storage and queue know of it.

    The outcome decides wherever there is one, else the last attempt: while it lives, the job is running.
    Without ``state``, the job's place in the queue and its progress are not known.
    """
    url = f"{root_path}/jobs/{record.id}"
    links = Links(self=url, cancel=f"{url}/cancel", artifacts=f"{url}/artifacts")
    state = state or QueueState(workers_alive=1)
    if outcome is None:
        last = attempts[-1] if attempts else None
        running = last is not None and last.end is None
        return Job(
            id=record.id,
            status=JobStatus.RUNNING if running else JobStatus.QUEUED,
            attempt=last.number if last else 0,
            queue_position=None if running else state.position,
            progress=state.progress if running else Progress(),
            input=record.input,
            options=record.options,
            artifacts=(),
            error=None,
            warnings=() if running or state.workers_alive else (NO_WORKER,),
            timings=None,
            model=None,
            engine=None,
            created_at=record.created_at,
            started_at=last.record.started_at if last else None,
            finished_at=None,
            expires_at=None,
            links=links,
        )
    letting_go = outcome.status is JobStatus.CANCELED and state.leased
    counted = (
        record.input if outcome.frames is None else record.input.model_copy(update={"frames": outcome.frames})
    )
    return Job(
        id=record.id,
        status=JobStatus.CANCELING if letting_go else outcome.status,
        attempt=outcome.attempt,
        queue_position=None,
        progress=Progress(phase="done", frames_done=outcome.frames or 0, frames_total=outcome.frames),
        input=counted,
        options=record.options,
        artifacts=tuple(
            PublishedArtifact(url=f"{links.artifacts}/{a.name}", **a.model_dump()) for a in outcome.artifacts
        ),
        error=outcome.error,
        warnings=outcome.warnings,
        timings=outcome.timings,
        model=outcome.model,
        engine=outcome.engine,
        created_at=record.created_at,
        started_at=outcome.started_at,
        finished_at=outcome.finished_at,
        expires_at=outcome.finished_at + retention,
        links=links,
    )


NO_WORKER = JobWarning(code="no_worker", detail="No worker is alive; the job waits until one comes.")
