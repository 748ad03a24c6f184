"""The service itself: is it alive, can it take uploads, what runs here."""

from contextlib import suppress
from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from service.errors import QueueUnavailable
from service.jobs import WorkerInfo
from service.services import ServicesDep

router = APIRouter()


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
