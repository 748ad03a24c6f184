"""Clearing up what time and crashes leave behind, at start and on a timer; twice changes nothing."""

import logging
from datetime import timedelta

from pydantic import ValidationError

from service.jobs import utc_now
from service.queue import JobQueue
from service.settings import ServiceSettings
from service.storage import JobStorage

logger = logging.getLogger(__name__)


def sweep(storage: JobStorage, queue: JobQueue, settings: ServiceSettings) -> None:
    """Expire finished jobs, and remove what nobody needs any more, on the disk and in Redis.

    Raises:
        QueueUnavailable: Redis cannot be reached; what is on the disk has been dealt with.
    """
    storage.sweep_leftovers(
        upload_idle_seconds=2 * settings.upload_idle_seconds + settings.probe_timeout_seconds,
        tombstone_seconds=settings.tombstone_seconds,
    )
    expired_before = utc_now() - timedelta(seconds=settings.retention_seconds)
    for job_id in storage.job_ids():
        try:
            outcome = storage.outcome(job_id)
        except ValidationError:
            logger.error("The outcome of job %s is damaged", job_id)
            continue
        if outcome is None:
            continue
        if outcome.finished_at < expired_before:
            storage.remove(job_id)
        else:
            storage.tidy(job_id, outcome, keep_source=settings.keep_originals)
    for job_id in set(queue.known_jobs()):
        if storage.has_ended(job_id):
            queue.forget(job_id)
