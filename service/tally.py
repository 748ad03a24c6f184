"""What all processes of the service count together, in one hash in Redis; ``/metrics`` shows it.

Nothing is decided by these figures: they start again from zero where Redis is emptied, and a process that
dies between doing and counting leaves one out. They are exposed as ``imcnet_<name>_total``, also while they
are zero, so that the first event is seen as an increase.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from redis import Redis
from rq.utils import as_text

from service.broker import translated
from service.errors import PROBLEMS
from service.jobs import AttemptEnd, JobStatus, Outcome, Timings

ATTEMPTS_BEGUN = "attempts_begun"
FRAMES_SEGMENTED = "frames_segmented"
SPANS_FINISHED = "spans_finished"
JOBS_DELIVERED = "jobs_delivered"
JOBS_REQUEUED = "jobs_requeued"
RECONCILIATIONS = "reconciliations"

_KEY = "imcnet:tally"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Counters of one name. ``values``: the combinations of label values that are known beforehand."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ((),)


FAMILIES = (
    Family(
        name="jobs_finished",
        help="Jobs that have ended, by how; code is that of the error, else empty.",
        labels=("status", "code"),
        values=(
            (JobStatus.SUCCEEDED, ""),
            (JobStatus.CANCELED, ""),
            *((JobStatus.FAILED, code) for code in PROBLEMS),
        ),
    ),
    Family(name=ATTEMPTS_BEGUN, help="Attempts begun at jobs."),
    Family(
        name="attempts_ended",
        help="Attempts that ended without an outcome, by reason.",
        labels=("reason",),
        values=tuple((end,) for end in AttemptEnd),
    ),
    Family(name=FRAMES_SEGMENTED, help="Frames segmented, those of attempts that came to nothing too."),
    Family(name=SPANS_FINISHED, help="Spans stored, which the next attempt need not do again."),
    Family(
        name="stage_seconds",
        help="Seconds that succeeded jobs spent in a stage; all but queue overlap.",
        labels=("stage",),
        values=(("queue",), ("decode",), ("inference",), ("encode",)),
    ),
    Family(name=JOBS_DELIVERED, help="Deliveries of jobs put into the queue."),
    Family(name=JOBS_REQUEUED, help="Deliveries of jobs that had been delivered before."),
    Family(name=RECONCILIATIONS, help="Passes of reconciliation."),
)


def job_finished(outcome: Outcome) -> str:
    return f"jobs_finished:{outcome.status}:{outcome.error.code if outcome.error else ''}"


def attempt_ended(end: AttemptEnd) -> str:
    return f"attempts_ended:{end}"


def stage_seconds(timings: Timings) -> dict[str, float]:
    """What a succeeded job adds."""
    return {
        "stage_seconds:queue": timings.queue_s,
        "stage_seconds:decode": timings.decode_s,
        "stage_seconds:inference": timings.inference_s,
        "stage_seconds:encode": timings.encode_s,
    }


class Tally:
    """The counters. Both methods raise QueueUnavailable where Redis cannot be reached."""

    def __init__(self, connection: Redis) -> None:
        self._redis = connection

    def add(self, counts: Mapping[str, float]) -> None:
        """Add to counters, to all or to none; the keys are this module's names."""
        with translated(), self._redis.pipeline() as pipeline:
            for name, count in counts.items():
                pipeline.hincrbyfloat(_KEY, name, count)
            pipeline.execute()

    def read(self) -> dict[str, float]:
        """Every counter that has been added to."""
        with translated():
            counts = self._redis.hgetall(_KEY)
        return {as_text(name): float(count) for name, count in counts.items()}
