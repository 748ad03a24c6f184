"""What the endpoints work with."""

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, Request

from service.errors import QueueUnavailable
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
    stopping: threading.Event = field(default_factory=threading.Event)  # whoever waits now, answers

    def job(self, job_id: str) -> Job:
        """Raises: JobNotFound, JobGone, QueueUnavailable."""
        record = self.storage.load(job_id)
        outcome = self.storage.outcome(job_id)
        state = None
        if outcome is None:
            state = self.queue.state(job_id)
            outcome = self.storage.outcome(job_id)  # it may have ended between the two looks
        elif outcome.status is JobStatus.CANCELED:
            with suppress(QueueUnavailable):  # how it ended is known; whether a worker is at it still, is not
                state = self.queue.state(job_id)
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
