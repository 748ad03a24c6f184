"""The endpoints, thin: what is asked → storage and queue → what is answered."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from service.downloads import ArtifactResponse
from service.errors import ImcnetError, InvalidRequest, JobGone, JobNotFound, QueueUnavailable
from service.jobs import (
    Job,
    JobInput,
    JobOptions,
    JobRecord,
    JobStatus,
    Outcome,
    PublishedArtifact,
    WorkerInfo,
    describe,
    utc_now,
)
from service.probe import probe_video
from service.problems import documented
from service.queue import JobQueue
from service.settings import ServiceSettings
from service.storage import JobStorage, new_job_id
from service.uploads import Upload, receive

_POLL_SECONDS = 0.25  # how often a waiting GET looks again
_RETRY_AFTER = {"Retry-After": "1"}

router = APIRouter()


@dataclass(frozen=True)
class Services:
    """What the endpoints work with."""

    settings: ServiceSettings
    storage: JobStorage
    queue: JobQueue

    def job(self, job_id: str) -> Job:
        """Raises: JobNotFound, JobGone, QueueUnavailable."""
        record = self.storage.load(job_id)
        outcome = self.storage.outcome(job_id)
        state = None
        # Only a canceled job's end still depends on the queue: other outcomes are told without Redis.
        if outcome is None or outcome.status is JobStatus.CANCELED:
            state = self.queue.state(job_id)
            outcome = outcome or self.storage.outcome(job_id)  # it may have ended between the two looks
        return describe(
            record,
            outcome,
            state,
            retention=timedelta(seconds=self.settings.retention_seconds),
            root_path=self.settings.root_path,
        )


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]


class JobPage(BaseModel):
    items: list[Job]
    next_cursor: str | None


class Version(BaseModel):
    """``workers`` is null where the queue cannot be asked."""

    version: str
    workers: tuple[WorkerInfo, ...] | None


class Readiness(BaseModel):
    """Whether uploads can be taken. Workers are only reported: without one, jobs wait."""

    ready: bool
    redis: bool
    storage: bool
    disk_free_bytes: int
    workers: int


# -- jobs ------------------------------------------------------------------------------------------------

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "description": "A form with the file in `video` and options as further fields; or the bare video.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["video"],
                    "properties": {
                        "video": {"type": "string", "format": "binary"},
                        **JobOptions.model_json_schema(ref_template="#/components/schemas/{model}")[
                            "properties"
                        ],
                    },
                }
            },
            "video/*": _BINARY,
            "application/octet-stream": _BINARY,
        },
    }
}


@router.post(
    "/jobs",
    status_code=202,
    openapi_extra=_UPLOAD_BODY,
    responses=documented(
        "bad_request",
        "request_timeout",
        "upload_too_large",
        "unsupported_media_type",
        "unsupported_container",
        "unsupported_codec",
        "invalid_options",
        "missing_video",
        "empty_file",
        "not_a_video",
        "no_video_stream",
        "undecodable_stream",
        "dimensions_below_limit",
        "dimensions_exceed_limit",
        "duration_exceeds_limit",
        "too_many_frames",
        "too_many_streams",
        "resource_limit",
        "queue_full",
        "queue_unavailable",
        "storage_full",
    ),
)
async def create_job(
    request: Request, response: Response, services: ServicesDep, options: Annotated[JobOptions, Query()]
) -> Job:
    """Post a video. It is probed before the answer, so what is no video is refused here."""
    settings, storage = services.settings, services.storage
    await run_in_threadpool(services.queue.check_room)
    upload = await receive(
        request,
        storage.new_upload(),
        max_upload_bytes=settings.max_upload_bytes,
        max_form_field_bytes=settings.max_form_field_bytes,
        idle_seconds=settings.upload_idle_seconds,
        disk_reserve_bytes=settings.disk_reserve_bytes,
    )
    try:
        record = await _probe(upload, _merge_options(options, upload.fields), settings)
        await run_in_threadpool(storage.accept, record, upload.path)
    finally:
        upload.path.unlink(missing_ok=True)
    try:
        await run_in_threadpool(services.queue.submit, record)
    except ImcnetError:
        await run_in_threadpool(storage.discard, record.id)  # no 202 was sent, so nothing was promised
        raise
    job = await run_in_threadpool(services.job, record.id)
    response.headers.update({"Location": job.links.self, **_RETRY_AFTER})
    return job


async def _probe(upload: Upload, options: JobOptions, settings: ServiceSettings) -> JobRecord:
    video = await probe_video(
        upload.path,
        limits=settings.media_limits,
        timeout_seconds=settings.probe_timeout_seconds,
        memory_bytes=settings.probe_memory_bytes,
    )
    return JobRecord(
        id=new_job_id(),
        created_at=utc_now(),
        options=options,
        input=JobInput(
            filename=upload.filename, bytes=upload.bytes, sha256=upload.sha256, **video.model_dump()
        ),
    )


def _merge_options(query: JobOptions, fields: Mapping[str, Sequence[str]]) -> JobOptions:
    """Options may come in the query or in the form, each in one place.

    Raises:
        InvalidRequest: An option is unknown, invalid or given twice.
    """
    chosen: dict[str, Any] = query.model_dump(exclude_unset=True)
    for name, values in fields.items():
        if name in chosen or (len(values) > 1 and name != "artifacts"):
            raise InvalidRequest(f"{name}: given more than once", code="invalid_options")
        chosen[name] = list(values) if name == "artifacts" else values[0]
    try:
        return JobOptions.model_validate(chosen)
    except ValidationError as error:
        complaints = (f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise InvalidRequest("; ".join(complaints), code="invalid_options") from error


@router.get("/jobs", responses=documented("invalid_options", "queue_unavailable"))
def list_jobs(
    services: ServicesDep,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[
        str | None, Query(description="`next_cursor` of the page before.", max_length=64)
    ] = None,
) -> JobPage:
    """The jobs, the newest first."""
    items: list[Job] = []
    for job_id in services.storage.job_ids(before=cursor):
        if len(items) == limit:
            return JobPage(items=items, next_cursor=items[-1].id)
        try:
            job = services.job(job_id)
        except (JobNotFound, JobGone):
            continue  # removed since the directory was listed
        if status is None or job.status is status:
            items.append(job)
    return JobPage(items=items, next_cursor=None)


@router.get(
    "/jobs/{job_id}",
    response_model=Job,
    responses={
        304: {"description": "Unchanged since `If-None-Match`."},
        **documented("invalid_options", "job_not_found", "job_gone", "queue_unavailable"),
    },
)
@router.head("/jobs/{job_id}", include_in_schema=False)
async def get_job(
    request: Request,
    services: ServicesDep,
    job_id: str,
    wait: Annotated[
        float,
        Query(
            ge=0, le=30, description="Seconds to wait for the job to end, or to differ from `If-None-Match`."
        ),
    ] = 0,
) -> Response:
    """How the job is doing."""
    known = request.headers.get("if-none-match")
    deadline = asyncio.get_running_loop().time() + wait
    while True:
        job = await run_in_threadpool(services.job, job_id)
        body = job.model_dump_json().encode()
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        changed = known is not None and known != etag
        if job.status.terminal or changed or asyncio.get_running_loop().time() >= deadline:
            break
        await asyncio.sleep(_POLL_SECONDS)
    headers = {"ETag": etag} | ({} if job.status.terminal else _RETRY_AFTER)
    if known == etag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.post(
    "/jobs/{job_id}/cancel",
    status_code=202,
    responses={
        200: {"description": "The job had ended already.", "model": Job},
        **documented("job_not_found", "job_gone", "queue_unavailable"),
    },
)
def cancel_job(services: ServicesDep, response: Response, job_id: str) -> Job:
    """Cancel the job. A worker that is at it lets go within seconds; nothing is published any more."""
    if not _settle_as_canceled(services, job_id):
        response.status_code = 200
    return services.job(job_id)


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    responses=documented("job_not_found", "job_gone", "queue_unavailable"),
)
def delete_job(services: ServicesDep, job_id: str) -> None:
    """Cancel the job if need be, and remove it with all its files."""
    _settle_as_canceled(services, job_id)
    services.storage.remove(job_id)


def _settle_as_canceled(services: Services, job_id: str) -> bool:
    """Returns: Whether this call ended the job; it may have ended otherwise before."""
    job = services.job(job_id)
    canceled = Outcome(
        status=JobStatus.CANCELED, finished_at=utc_now(), started_at=job.started_at, attempt=job.attempt
    )
    decided = services.storage.conclude(job_id, canceled, keep_source=services.settings.keep_originals)
    with suppress(QueueUnavailable):  # decided all the same: whoever picks the job up finds it settled
        services.queue.forget(job_id)
    return decided


# -- artifacts -------------------------------------------------------------------------------------------


@router.get(
    "/jobs/{job_id}/artifacts", responses=documented("job_not_found", "job_gone", "queue_unavailable")
)
@router.head("/jobs/{job_id}/artifacts", include_in_schema=False)
def list_artifacts(services: ServicesDep, job_id: str) -> tuple[PublishedArtifact, ...]:
    """What can be downloaded; nothing until the job has succeeded."""
    return services.job(job_id).artifacts


@router.get(
    "/jobs/{job_id}/artifacts/{name}",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": {"application/octet-stream": _BINARY}},
        206: {"description": "The range asked for.", "content": {"application/octet-stream": _BINARY}},
        304: {"description": "Unchanged since `If-None-Match`."},
        **documented(
            "bad_request",
            "job_not_found",
            "artifact_not_found",
            "job_gone",
            "artifact_not_ready",
            "range_not_satisfiable",
        ),
    },
)
@router.head("/jobs/{job_id}/artifacts/{name}", include_in_schema=False)
def get_artifact(request: Request, services: ServicesDep, job_id: str, name: str) -> Response:
    """Download an artifact, whole or in ranges. Its `ETag` is its SHA-256."""
    artifact, path = services.storage.artifact(job_id, name)
    return ArtifactResponse(artifact, path, if_none_match=request.headers.get("if-none-match"))


# -- the service itself ----------------------------------------------------------------------------------


@router.get("/livez")
@router.head("/livez", include_in_schema=False)
def livez() -> dict[Literal["alive"], bool]:
    """The process answers."""
    return {"alive": True}


@router.get(
    "/readyz", responses={503: {"model": Readiness, "description": "Redis or the storage is unusable."}}
)
@router.head("/readyz", include_in_schema=False)
def readyz(services: ServicesDep, response: Response) -> Readiness:
    """Whether uploads can be taken: Redis answers, the storage is writable and has room."""
    workers, free_bytes, redis_ok, storage_ok = 0, 0, True, True
    try:
        workers = len(services.queue.workers())
    except QueueUnavailable:
        redis_ok = False
    try:
        services.storage.check_writable()
        free_bytes = services.storage.free_bytes()
    except OSError:
        storage_ok = False
    storage_ok = storage_ok and free_bytes >= services.settings.disk_reserve_bytes
    ready = redis_ok and storage_ok
    if not ready:
        response.status_code = 503
    return Readiness(
        ready=ready, redis=redis_ok, storage=storage_ok, disk_free_bytes=free_bytes, workers=workers
    )


@router.get("/version")
@router.head("/version", include_in_schema=False)
def get_version(services: ServicesDep) -> Version:
    """What runs here: this build, and the model and device of every living worker."""
    workers = None
    with suppress(QueueUnavailable):
        workers = services.queue.workers()
    return Version(version=version("imcnet"), workers=workers)
