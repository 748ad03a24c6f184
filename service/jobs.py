"""The job contract: one type per concept, shared by the API, the storage and the worker.

``JobRecord`` is what was accepted (``job.json``), ``Outcome`` how it ended (``outcome.json``), ``QueueState``
what Redis knows in between. :func:`describe` makes the public :class:`Job` of the three.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, computed_field

from service.errors import PROBLEMS, ImcnetError, WorkerCrashed

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def utc_now() -> datetime:
    return datetime.now(UTC)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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


Quality = Literal["exact", "multi_scale"]


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
        description="`exact`: one look at each frame. `multi_scale`: the mean of nine, at three sizes and "
        "mirrored, which takes about twelve times as long.",
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


class Timings(_Model):
    """Seconds; decoding, inference and encoding overlap, so they do not add up to the job's time."""

    queue_s: float
    decode_s: float
    inference_s: float
    encode_s: float


class JobRecord(_Model):
    """``job.json``: the accepted job, written and synced before the client gets its 202."""

    version: Literal[1] = 1
    id: str
    created_at: AwareDatetime
    options: JobOptions
    input: JobInput


class Outcome(_Model):
    """``outcome.json``: how a job ended. Created exclusively, so whoever comes second did not decide."""

    version: Literal[1] = 1
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
    """What the queue knows of a job that has no outcome yet, or whose attempt is winding down."""

    running: bool
    attempt: int = 0
    started_at: datetime | None = None
    position: int | None = None
    progress: Progress = field(default_factory=Progress)
    workers_alive: int = 0


def given_up(state: QueueState | None) -> Outcome:
    """The outcome of a job that no attempt is left for; ``state`` is the last that the queue knew."""
    state = state or QueueState(running=False)
    return Outcome(
        status=JobStatus.FAILED,
        attempt=state.attempt,
        started_at=state.started_at,
        finished_at=utc_now(),
        error=Problem.of(WorkerCrashed()),
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
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None
    expires_at: AwareDatetime | None
    links: Links


def describe(
    record: JobRecord,
    outcome: Outcome | None,
    state: QueueState | None,
    *,
    retention: timedelta,
    root_path: str,
) -> Job:
    """Make the public job of what storage and queue know of it.

    The outcome decides wherever there is one. A job that the queue does not know (``state`` is None) and that
    has no outcome is still promised, so it is shown as queued.
    """
    url = f"{root_path}/jobs/{record.id}"
    links = Links(self=url, cancel=f"{url}/cancel", artifacts=f"{url}/artifacts")
    if outcome is None:
        state = state or QueueState(running=False)
        return Job(
            id=record.id,
            status=JobStatus.RUNNING if state.running else JobStatus.QUEUED,
            attempt=state.attempt,
            queue_position=None if state.running else state.position,
            progress=state.progress if state.running else Progress(),
            input=record.input,
            options=record.options,
            artifacts=(),
            error=None,
            warnings=() if state.running or state.workers_alive else (NO_WORKER,),
            timings=None,
            model=None,
            created_at=record.created_at,
            started_at=state.started_at,
            finished_at=None,
            expires_at=None,
            links=links,
        )
    letting_go = outcome.status is JobStatus.CANCELED and state is not None and state.running
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
        created_at=record.created_at,
        started_at=outcome.started_at,
        finished_at=outcome.finished_at,
        expires_at=outcome.finished_at + retention,
        links=links,
    )


NO_WORKER = JobWarning(code="no_worker", detail="No worker is alive; the job waits until one comes.")
