"""Keeping the promise of a 202: whatever dies, an accepted job gets its next attempt or its outcome.

A job without an outcome either waits, and then the queue has a delivery of it, or runs, and then its attempt
has a lease. Reconciliation finds those for which neither is true. It runs at start and on a timer, in every
API and every idle worker; twice changes nothing.
"""

import logging
from dataclasses import dataclass

from pydantic import ValidationError

from service.errors import JobGone, JobNotFound, StorageUnavailable
from service.jobs import Attempt, AttemptEnd, given_up, is_lost_cause
from service.queue import JobQueue
from service.storage import JobStorage
from service.tally import RECONCILIATIONS, attempt_ended, job_finished

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """Holds the queue to what the storage says. ``keep_source``: uploads are kept until jobs expire."""

    storage: JobStorage
    queue: JobQueue
    max_attempts: int
    keep_source: bool

    def run(self, *, interval_seconds: float) -> None:
        """Look after all jobs without an outcome, unless somebody else has within the interval.

        Raises:
            QueueUnavailable: Redis cannot be reached; nothing is lost, and the next time will do.
        """
        if not self.queue.claim_pass(interval_seconds=interval_seconds):
            return
        settling = self.queue.is_settling()
        for job_id in self.storage.unfinished():
            try:
                self._look_after(job_id, settling=settling)
            except (JobNotFound, JobGone):
                continue  # deleted meanwhile
            except (
                StorageUnavailable,
                OSError,
                ValidationError,
            ) as error:  # a full disk, or a damaged record
                logger.warning("Job %s cannot be looked after: %s", job_id, error)
        self.queue.count({RECONCILIATIONS: 1})

    def hand_on(self, job_id: str, attempt: Attempt, end: AttemptEnd) -> None:
        """End an attempt that has not settled its job, and queue the next; or settle it, where none is due.

        The next attempt goes to the front of the queue: the job has waited already.

        Raises:
            QueueUnavailable: The attempt has ended, but Redis is away; reconciliation does the rest.
            StorageFull: The attempt has ended, but the outcome finds no room; reconciliation tries again.
            OSError: The storage cannot be changed.
        """
        if not self.storage.end(attempt, end):
            return
        self.queue.count({attempt_ended(end): 1})
        self.queue.discard(attempt.record.delivery)
        attempts = self.storage.attempts(job_id)
        if is_lost_cause(attempts, max_attempts=self.max_attempts):
            self._give_up(job_id, attempts)
        else:
            self.queue.deliver(job_id, attempt=attempt.number, at_front=True)

    def _look_after(self, job_id: str, *, settling: bool) -> None:
        attempts = self.storage.attempts(job_id)
        last = attempts[-1] if attempts else None
        if last is not None and last.end is None:
            if not settling and not self.queue.is_leased(last.record.delivery):
                logger.warning("Job %s: the lease of attempt %d has run out", job_id, last.number)
                self.hand_on(job_id, last, AttemptEnd.LOST)
        elif is_lost_cause(attempts, max_attempts=self.max_attempts):
            self._give_up(job_id, attempts)
        elif self.queue.has_lost(job_id) and self.queue.deliver(job_id, attempt=len(attempts)):
            logger.warning("Job %s was not in the queue; it is now", job_id)

    def _give_up(self, job_id: str, attempts: list[Attempt]) -> None:
        outcome = given_up(attempts)
        if self.storage.conclude(job_id, outcome, keep_source=self.keep_source):
            self.queue.count({job_finished(outcome): 1})
        self.queue.forget(job_id)
