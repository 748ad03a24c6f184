"""Counters that several processes share, on a real Redis."""

import subprocess
import sys

import pytest
from redis import Redis

from service import tally
from service.broker import connect
from service.errors import PROBLEMS, QueueUnavailable
from service.jobs import AttemptEnd, JobStatus, Outcome, Problem, Timings, utc_now
from service.tally import FAMILIES, Tally
from tests.conftest import REPOSITORY

FAILED = Outcome(
    status=JobStatus.FAILED,
    finished_at=utc_now(),
    error=Problem(title="", detail="", code="worker_crashed"),
)
CANCELED = Outcome(status=JobStatus.CANCELED, finished_at=utc_now())
TIMINGS = Timings(queue_s=1.5, decode_s=2.0, inference_s=8.25, encode_s=0.5)


def test_what_was_never_counted_is_not_there(redis: Redis) -> None:
    assert Tally(redis).read() == {}


def test_counts_add_up(redis: Redis) -> None:
    counts = Tally(redis)
    counts.add({tally.FRAMES_SEGMENTED: 256, tally.ATTEMPTS_BEGUN: 1})
    counts.add({tally.FRAMES_SEGMENTED: 44, **tally.stage_seconds(TIMINGS)})
    counts.add(tally.stage_seconds(TIMINGS))
    assert counts.read() == {
        "frames_segmented": 300.0,
        "attempts_begun": 1.0,
        "stage_seconds:queue": 3.0,
        "stage_seconds:decode": 4.0,
        "stage_seconds:inference": 16.5,
        "stage_seconds:encode": 1.0,
    }


def test_several_processes_count_together(redis: Redis, redis_url: str) -> None:
    program = f"""
from redis import Redis
from service.tally import Tally
counts = Tally(Redis.from_url({redis_url!r}))
for _ in range(200):
    counts.add({{"spans_finished": 1}})
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert Tally(redis).read() == {"spans_finished": 600.0}


def test_every_name_belongs_to_a_family_that_knows_its_labels() -> None:
    names = [
        *(tally.ATTEMPTS_BEGUN, tally.FRAMES_SEGMENTED, tally.SPANS_FINISHED, tally.JOBS_DELIVERED),
        *(tally.JOBS_REQUEUED, tally.RECONCILIATIONS),
        *(tally.job_finished(outcome) for outcome in (FAILED, CANCELED)),
        *map(tally.attempt_ended, AttemptEnd),
        *tally.stage_seconds(TIMINGS),
    ]
    known = {":".join((family.name, *values)) for family in FAMILIES for values in family.values}
    assert set(names) <= known
    assert {name.partition(":")[0] for name in names} == {family.name for family in FAMILIES}


def test_a_failed_job_is_counted_by_its_code_and_every_code_is_known() -> None:
    assert tally.job_finished(FAILED) == "jobs_finished:failed:worker_crashed"
    assert tally.job_finished(CANCELED) == "jobs_finished:canceled:"
    (family,) = [family for family in FAMILIES if family.name == "jobs_finished"]
    assert {code for status, code in family.values if status == "failed"} == set(PROBLEMS)


def test_an_unreachable_redis_is_said() -> None:
    counts = Tally(connect("redis://127.0.0.1:1/0", timeout_seconds=0.5))
    with pytest.raises(QueueUnavailable):
        counts.add({tally.ATTEMPTS_BEGUN: 1})
    with pytest.raises(QueueUnavailable):
        counts.read()
