"""Clearing up what time and crashes leave behind, at start and on a timer; twice changes nothing."""

import logging
from datetime import timedelta

from service.errors import JobGone, JobNotFound, QueueUnavailable
from service.jobs import given_up, utc_now
from service.queue import JobQueue
from service.settings import ServiceSettings
from service.storage import JobStorage

logger = logging.getLogger(__name__)


def sweep(storage: JobStorage, queue: JobQueue, settings: ServiceSettings) -> None:
    """Expire finished jobs, clear left-overs, and keep the promise of jobs that the queue has lost."""
    storage.sweep_leftovers(
        upload_idle_seconds=2 * settings.upload_idle_seconds + settings.probe_timeout_seconds,
        tombstone_seconds=settings.tombstone_seconds,
    )
    expired_before = utc_now() - timedelta(seconds=settings.retention_seconds)
    unfinished = []
    for job_id in storage.job_ids():
        outcome = storage.outcome(job_id)
        if outcome is None:
            unfinished.append(job_id)
        elif outcome.finished_at < expired_before:
            storage.remove(job_id)
    try:
        for job_id in unfinished:
            _keep_promise(job_id, storage, queue, keep_source=settings.keep_originals)
    except QueueUnavailable as error:
        logger.warning("%s", error.detail)


def _keep_promise(job_id: str, storage: JobStorage, queue: JobQueue, *, keep_source: bool) -> None:
    """Queue an accepted job that the queue does not know; end one that the queue has given up.

    Raises:
        QueueUnavailable: Redis cannot be reached.
    """
    try:
        if queue.crashed(job_id):
            storage.conclude(job_id, given_up(queue.state(job_id)), keep_source=keep_source)
            queue.forget(job_id)
        else:
            queue.submit(storage.load(job_id))
    except (JobNotFound, JobGone):
        return  # deleted meanwhile
