"""``/jobs``: look up, list, cancel, delete."""

import asyncio
import hashlib
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from service.downloads import matches
from service.errors import JobGone, JobNotFound
from service.jobs import Job, JobStatus
from service.keys import ApiKey
from service.problems import documented
from service.services import KeyDep, Services, ServicesDep

_POLL_SECONDS = 0.25  # how often a waiting GET looks again

router = APIRouter()


class JobPage(BaseModel):
    items: list[Job]
    next_cursor: str | None


@router.get("/jobs", responses=documented("invalid_options", "queue_unavailable"))
def list_jobs(
    services: ServicesDep,
    key: KeyDep,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[
        str | None, Query(description="`next_cursor` of the page before.", max_length=64)
    ] = None,
) -> JobPage:
    """The jobs, the newest first; those of the key, if there are keys."""
    own = None if key is None else services.owners.jobs(key.id)
    items: list[Job] = []
    for job_id in services.storage.job_ids(before=cursor):
        if own is not None and job_id not in own:
            continue
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
    key: KeyDep,
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
        job = await run_in_threadpool(_look_up, services, key, job_id)
        body = job.model_dump_json().encode()
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        unchanged = known is not None and matches(known, etag)
        waited = asyncio.get_running_loop().time() >= deadline or services.stopping.is_set()
        if job.status.terminal or waited or (known is not None and not unchanged):
            break
        await asyncio.sleep(_POLL_SECONDS)
    headers = {"ETag": etag} | ({} if job.status.terminal else {"Retry-After": "1"})
    if unchanged:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _look_up(services: Services, key: ApiKey | None, job_id: str) -> Job:
    services.check_key(key)
    return services.job(job_id)


@router.post(
    "/jobs/{job_id}/cancel",
    status_code=202,
    responses={
        200: {"description": "The job had ended already.", "model": Job},
        **documented("job_not_found", "job_gone", "queue_unavailable", "storage_full"),
    },
)
def cancel_job(services: ServicesDep, response: Response, job_id: str) -> Job:
    """Cancel the job. A worker that is at it lets go within seconds; nothing is published any more."""
    if not services.cancel(job_id):
        response.status_code = 200
    return services.job(job_id)


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    responses=documented("job_not_found", "job_gone"),
)
def delete_job(services: ServicesDep, job_id: str) -> None:
    """Remove the job with all its files; a worker that is at it lets go within seconds."""
    services.storage.load(job_id)
    services.remove(job_id)
