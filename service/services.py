"""What the endpoints work with."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, Request

from service.jobs import Job, JobStatus, describe
from service.queue import JobQueue
from service.settings import ServiceSettings
from service.storage import JobStorage


@dataclass(frozen=True)
class Services:
    """The settings, where jobs are kept, and where they wait."""

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
