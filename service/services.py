"""What the endpoints work with."""

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from service.errors import JobNotFound, QueueUnavailable, Unauthorized
from service.idempotency import IdempotencyKeys
from service.jobs import Attempt, Job, JobRecord, JobStatus, Outcome, QueueState, describe, utc_now
from service.keys import ApiKey, KeyRing
from service.ownership import Ownership
from service.queue import JobQueue
from service.reconciliation import Reconciliation
from service.settings import ServiceSettings
from service.storage import JobStorage
from service.tally import job_finished


@dataclass(frozen=True)
class Services:
    """The settings; where jobs are kept and wait; what clients call them; whose they are; who may probe."""

    settings: ServiceSettings
    storage: JobStorage
    queue: JobQueue
    idempotency: IdempotencyKeys
    keys: KeyRing
    owners: Ownership
    probing: asyncio.Semaphore
    stopping: threading.Event = field(default_factory=threading.Event)  # whoever waits now, answers

    @property
    def promises(self) -> Reconciliation:
        return Reconciliation(
            storage=self.storage,
            queue=self.queue,
            max_attempts=self.settings.max_attempts,
            keep_source=self.settings.keep_originals,
        )

    def job(self, job_id: str) -> Job:
        """Raises: JobNotFound, JobGone, QueueUnavailable."""
        record = self.storage.load(job_id)
        outcome, attempts, state = self.storage.outcome(job_id), [], None
        if outcome is None:
            state = self.queue.state(job_id)
            attempts = self.storage.attempts(job_id)
            outcome = self.storage.outcome(job_id)  # it may have ended, and lost its attempts, meanwhile
        elif outcome.status is JobStatus.CANCELED:
            with suppress(QueueUnavailable):  # how it ended is known; whether a worker is at it still, is not
                state = self.queue.state(job_id)
        return self._describe(record, outcome, attempts, state)

    def check_key(self, key: ApiKey | None) -> None:
        """For what takes long. Raises: Unauthorized: The key has been revoked since the request began."""
        if key is not None and not self.keys.lives(key):
            raise Unauthorized

    def cancel(self, job_id: str) -> bool:
        """Settle the job as canceled; a worker that is at it lets go within seconds, with or without Redis.

        Returns:
            Whether this call ended the job; it may have ended before, in whatever way.
        Raises:
            JobNotFound, JobGone, StorageFull.
        """
        self.storage.load(job_id)
        attempts = self.storage.attempts(job_id)
        last = attempts[-1] if attempts else None
        canceled = Outcome(
            status=JobStatus.CANCELED,
            finished_at=utc_now(),
            started_at=last.record.started_at if last else None,
            attempt=last.number if last else 0,
        )
        decided = self.storage.conclude(job_id, canceled, keep_source=self.settings.keep_originals)
        self._forget(job_id)
        if decided:
            self.queue.count({job_finished(canceled): 1})
        return decided

    def remove(self, job_id: str) -> None:
        """Remove the job with all its files; a worker that is at it lets go within seconds."""
        self.storage.remove(job_id)
        self._forget(job_id)

    def _forget(self, job_id: str) -> None:
        with suppress(QueueUnavailable):  # whoever picks the job up finds that it has ended, or is gone
            self.queue.forget(job_id)

    def accepted(self, record: JobRecord) -> Job:
        """The job as it is told to the one who has just posted it, whatever becomes of it meanwhile."""
        return self._describe(record, None, [], None)

    def _describe(
        self, record: JobRecord, outcome: Outcome | None, attempts: list[Attempt], state: QueueState | None
    ) -> Job:
        return describe(
            record,
            outcome,
            attempts,
            state,
            retention=timedelta(seconds=self.settings.retention_seconds),
            root_path=self.settings.root_path,
        )


# Coroutines, though they wait for nothing: FastAPI would run a plain function in a thread, and threads are
# slow to come by while uploads are being written.
async def _key(request: Request) -> ApiKey | None:
    key: ApiKey | None = request.state.key
    return key


KeyDep = Annotated[ApiKey | None, Depends(_key)]


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]


async def check_owner(request: Request, services: ServicesDep, key: KeyDep) -> None:
    """Dependency of all endpoints. Raises: JobNotFound: The job asked for is not of the key that asks."""
    job_id = request.path_params.get("job_id")
    if key is None or job_id is None:
        return
    if not await run_in_threadpool(services.owners.owns, key.id, job_id):
        raise JobNotFound
