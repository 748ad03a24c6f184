"""What the jobs and uploads of a key may take, never exceeded by all processes together."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from service.errors import QuotaExceeded
from service.keys import ApiKey
from service.ownership import Reservation, Usage
from service.services import Services
from service.settings import ServiceSettings


@dataclass(frozen=True)
class Sender:
    """Whose upload it is, and the room that is kept for it."""

    key: ApiKey
    room: Reservation


@asynccontextmanager
async def room_for(
    services: Services, key: ApiKey | None, declared_bytes: int, *, sent_before: bool
) -> AsyncIterator[Sender | None]:
    """Keep room for an upload for as long as the block lasts; all that there is, where it declares no length.

    Args:
        key: None where there are no keys, and so no quota.
        sent_before: The upload may make no new job, so it need only fit beside other uploads.

    Raises:
        QuotaExceeded: There is no room.
    """
    if key is None:
        yield None
        return
    room = await run_in_threadpool(_reserve, services, key, declared_bytes, sent_before=sent_before)
    try:
        yield Sender(key, room)
    finally:
        room.release()


def _reserve(services: Services, key: ApiKey, declared_bytes: int, *, sent_before: bool) -> Reservation:
    owners, settings = services.owners, services.settings
    with owners.locked(key.id):
        usage = owners.uploads(key.id)
        if not sent_before:
            usage += owners.usage(key.id)
        most = check_quota(key, usage, settings, upload_bytes=declared_bytes)
        return owners.reserve(key.id, declared_bytes or min(most, settings.max_upload_bytes))


@contextmanager
def take_room(services: Services, sender: Sender, upload_bytes: int) -> Iterator[None]:
    """Let a job take the place of the upload: nobody else adds any for the sender until the block ends.

    Raises:
        QuotaExceeded: There is no room for the job.
    """
    owners, owner = services.owners, sender.key.id
    with owners.locked(owner):  # by all processes: none counts what another is about to add
        sender.room.release()
        usage = owners.usage(owner) + owners.uploads(owner)
        check_quota(sender.key, usage, services.settings, upload_bytes=upload_bytes)
        yield


def check_quota(key: ApiKey, usage: Usage, settings: ServiceSettings, *, upload_bytes: int) -> int:
    """Hold what a key has, and one more job of an upload of that size, against its limits.

    Returns:
        How many bytes the upload could have at most.
    Raises:
        QuotaExceeded: The key would have too much.
    """
    limits = key.limits
    active_jobs = limits.active_jobs or settings.key_active_jobs
    queued_bytes = limits.queued_bytes or settings.key_queued_bytes
    stored_bytes = limits.stored_bytes or settings.key_stored_bytes
    for needed, allowed, what in (
        (usage.active_jobs + 1, active_jobs, "jobs that have not ended"),
        (usage.queued_bytes + upload_bytes, queued_bytes, "bytes of uploads whose jobs have not ended"),
        (usage.stored_bytes + upload_bytes, stored_bytes, "bytes of stored jobs"),
    ):
        if needed > allowed:
            raise QuotaExceeded(f"The key may have {allowed} {what}; with this job it would have {needed}.")
    return min(queued_bytes - usage.queued_bytes, stored_bytes - usage.stored_bytes)
