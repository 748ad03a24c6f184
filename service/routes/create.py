"""``POST /jobs``: receive → probe → accept → queue."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from service.durable import disk_errors_translated
from service.errors import ImcnetError, InvalidRequest, JobNotFound
from service.idempotency import MAX_KEY_LENGTH, Claim, HeldKey, check_key, fingerprint_of
from service.jobs import Job, JobInput, JobOptions, JobRecord, utc_now
from service.probe import probe_video
from service.problems import Responses, documented
from service.quota import Sender, room_for, take_room
from service.services import KeyDep, Services, ServicesDep
from service.settings import ServiceSettings
from service.storage import JobStorage, new_job_id
from service.uploads import Upload, declared_bytes, receive

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
_ACCEPTED: Responses = {
    202: {
        "description": "The job is accepted: it will come to an end, whatever happens.",
        "headers": {
            "Location": {"description": "The job.", "schema": {"type": "string"}},
            "Idempotency-Replayed": {
                "description": "`true` where an earlier request with the same key has made the job.",
                "schema": {"type": "string"},
            },
        },
    }
}
_IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Of the client's choice, a UUID for one. A request with a key may be sent again, however "
        "it has ended: if it has made a job, then that is the answer, and no second one is made.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_KEY_LENGTH, "pattern": "^[ -~]+$"},
    ),
]


@router.post(
    "/jobs",
    status_code=202,
    openapi_extra=_UPLOAD_BODY,
    responses=_ACCEPTED
    | documented(
        "bad_request",
        "quota_exceeded",
        "job_gone",
        "request_timeout",
        "upload_too_large",
        "unsupported_media_type",
        "unsupported_container",
        "unsupported_codec",
        "invalid_options",
        "idempotency_key_reused",
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
        "storage_unavailable",
    ),
)
async def create_job(
    request: Request,
    response: Response,
    services: ServicesDep,
    client: KeyDep,
    options: Annotated[JobOptions, Query()],
    idempotency_key: _IdempotencyKey = None,
) -> Job:
    """Post a video. It is probed before the answer, so what is no video is refused here."""
    if idempotency_key is not None:
        check_key(idempotency_key)
        if client is not None:  # two clients may have chosen the same
            idempotency_key = f"{client.id} {idempotency_key}"
    declared = declared_bytes(request, max_bytes=services.settings.max_upload_bytes)
    sent_before = await _is_used(services, idempotency_key)
    if not sent_before:
        await run_in_threadpool(services.queue.check_room)
    async with (
        room_for(services, client, declared, sent_before=sent_before) as sender,
        _received(request, services, sender) as upload,
    ):
        chosen = _merge_options(options, upload.fields)
        if idempotency_key is None:
            record = await _accept(services, sender, upload, chosen)
        else:
            record, replayed = await _accept_once(services, sender, upload, chosen, idempotency_key)
            if replayed:
                response.headers["Idempotency-Replayed"] = "true"
    job = await run_in_threadpool(_describe, services, record)
    response.headers.update({"Location": job.links.self, "Retry-After": "1"})
    return job


async def _is_used(services: Services, key: str | None) -> bool:
    """Whether the key may stand for a job, to which the room for new ones is of no matter any more."""
    return key is not None and await run_in_threadpool(services.idempotency.is_used, key)


def _received(
    request: Request, services: Services, sender: Sender | None
) -> AbstractAsyncContextManager[Upload]:
    settings = services.settings
    return receive(
        request,
        services.storage.new_upload(),
        max_upload_bytes=settings.max_upload_bytes if sender is None else sender.room.upload_bytes,
        max_form_field_bytes=settings.max_form_field_bytes,
        max_seconds=settings.upload_max_seconds,
        idle_seconds=settings.upload_idle_seconds,
        min_bytes_per_second=settings.upload_min_bytes_per_second,
        disk_reserve_bytes=settings.disk_reserve_bytes,
    )


async def _accept_once(
    services: Services, sender: Sender | None, upload: Upload, options: JobOptions, key: str
) -> tuple[JobRecord, bool]:
    """Returns: The job that the key stands for, and whether it stood for it before."""
    fingerprint = fingerprint_of(upload.sha256, options)
    async with services.idempotency.held(key) as held:
        record = await run_in_threadpool(_made_before, services.storage, held.claim, fingerprint)
        if record is not None:
            return record, True
        return await _accept(services, sender, upload, options, key=held), False


def _made_before(storage: JobStorage, claim: Claim | None, fingerprint: str) -> JobRecord | None:
    """Raises: JobGone: It was, and is gone. InvalidRequest: ``idempotency_key_reused``."""
    if claim is None:
        return None
    try:
        with disk_errors_translated():
            record = storage.load(claim.job_id)
    except JobNotFound:
        return None  # whoever was about to make it failed, or died
    if claim.fingerprint != fingerprint:
        detail = "The Idempotency-Key was used before, with another video or other options."
        raise InvalidRequest(detail, code="idempotency_key_reused")
    return record


async def _accept(
    services: Services,
    sender: Sender | None,
    upload: Upload,
    options: JobOptions,
    *,
    key: HeldKey | None = None,
) -> JobRecord:
    async with services.probing:  # many at once would all take longer than they are allowed
        record = await _probe(upload, options, services.settings)
    if sender is None:
        await run_in_threadpool(_enter, services, record, upload, key)
    else:
        await run_in_threadpool(_enter_for, sender, services, record, upload, key)
    return record


def _enter_for(
    sender: Sender, services: Services, record: JobRecord, upload: Upload, key: HeldKey | None
) -> None:
    """Make the job of a key, within its quota. Raises: Unauthorized, QuotaExceeded; as :func:`_enter`."""
    services.check_key(sender.key)
    with take_room(services, sender, upload.bytes):
        services.owners.enter(sender.key.id, record.id)
        try:
            _enter(services, record, upload, key)
        except BaseException:
            services.owners.leave(sender.key.id, record.id)
            raise


def _enter(services: Services, record: JobRecord, upload: Upload, key: HeldKey | None) -> None:
    """Make the job: from now on it exists, whatever dies. If this fails, it does not."""
    services.queue.check_room()  # again: many may have been received at once
    with disk_errors_translated():
        if key is not None:
            key.write(Claim(job_id=record.id, fingerprint=fingerprint_of(upload.sha256, record.options)))
        services.storage.accept(record, upload.path)
    try:
        services.queue.deliver(record.id)
    except ImcnetError:  # no 202 was sent, so nothing was promised
        if key is not None:
            key.release()  # first: should we die now, the key must not stand for a job that is gone
        services.storage.remove(record.id)
        raise


def _describe(services: Services, record: JobRecord) -> Job:
    """The job as far as it is known: it is accepted, so it is told, even if Redis or the disk fails now."""
    try:
        return services.job(record.id)
    except (ImcnetError, OSError):
        return services.accepted(record)


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
