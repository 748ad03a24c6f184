"""``POST /jobs``: receive → probe → accept → queue."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from service.errors import ImcnetError, InvalidRequest
from service.jobs import Job, JobInput, JobOptions, JobRecord, utc_now
from service.probe import probe_video
from service.problems import documented
from service.services import ServicesDep
from service.settings import ServiceSettings
from service.storage import new_job_id
from service.uploads import Upload, receive

router = APIRouter()

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
        min_bytes_per_second=settings.upload_min_bytes_per_second,
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
        await run_in_threadpool(storage.remove, record.id)  # no 202 was sent, so nothing was promised
        raise
    job = await run_in_threadpool(services.job, record.id)
    response.headers.update({"Location": job.links.self, "Retry-After": "1"})
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
