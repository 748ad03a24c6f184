"""The streams of events, on a real Redis."""

from collections.abc import Callable

import pytest
from redis import Redis

from service.broker import connect
from service.errors import QueueUnavailable
from service.events import BEGINNING, JobEvents, is_event_id
from service.storage import new_job_id


@pytest.fixture
def events(redis: Redis) -> JobEvents:
    return JobEvents(redis, max_events=10)


def data_after(events: JobEvents, job_id: str, last_id: str = BEGINNING, *, count: int = 100) -> list[str]:
    return [event.data for event in events.after(job_id, last_id, count=count)]


def test_events_come_in_order_and_from_where_one_left_off(events: JobEvents) -> None:
    job_id = new_job_id()
    events.append(job_id, "status", '{"status": "queued", "attempt": 0}')
    for number in range(4):
        events.append(job_id, "progress", str(number))
    told = events.after(job_id, BEGINNING, count=100)
    assert [event.kind for event in told] == ["status", *["progress"] * 4]
    assert data_after(events, job_id, told[2].id) == ["2", "3"]
    assert data_after(events, job_id, told[0].id, count=2) == ["0", "1"]
    assert data_after(events, job_id, told[-1].id) == []
    assert events.newest_id(job_id) == told[-1].id


def test_a_job_has_its_own_events(events: JobEvents) -> None:
    job_id = new_job_id()
    events.append(new_job_id(), "progress", "another's")
    assert data_after(events, job_id) == []
    assert events.newest_id(job_id) == BEGINNING


def test_the_oldest_events_make_room(events: JobEvents) -> None:
    job_id = new_job_id()
    for number in range(25):
        events.append(job_id, "progress", str(number))
    assert data_after(events, job_id) == [str(number) for number in range(15, 25)]


def test_events_of_a_pipeline_come_with_the_rest_of_it(events: JobEvents, redis: Redis) -> None:
    job_id = new_job_id()
    with redis.pipeline() as pipeline:
        pipeline.set("other", 1)
        events.append(job_id, "progress", "a", pipeline=pipeline)
        assert data_after(events, job_id) == []
        pipeline.execute()
    assert data_after(events, job_id) == ["a"]


def test_deleted_events_leave_no_key(events: JobEvents, redis: Redis) -> None:
    job_id = new_job_id()
    events.append(job_id, "progress", "a")
    assert redis.keys() == [JobEvents.key_of(job_id).encode()]
    events.delete(job_id)
    assert redis.keys() == []


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (BEGINNING, True),
        ("1764000000000-3", True),
        (f"{2**64 - 1}-0", True),
        (f"{2**64}-0", False),
        ("end", False),
        ("", False),
        ("-", False),
        ("1", False),
        ("-1-0", False),
        ("1-0\n", False),
        ("٣-0", False),
    ],
)
def test_ids_are_told_from_other_words(events: JobEvents, text: str, valid: bool) -> None:
    assert is_event_id(text) is valid
    if valid:
        events.after(new_job_id(), text, count=1)  # Redis takes it as well


@pytest.mark.parametrize(
    "call",
    [
        lambda events: events.append("job", "progress", "a"),
        lambda events: events.after("job", BEGINNING, count=1),
        lambda events: events.newest_id("job"),
        lambda events: events.delete("job"),
    ],
)
def test_an_unreachable_redis_is_said_so(call: Callable[[JobEvents], object]) -> None:
    with pytest.raises(QueueUnavailable):
        call(JobEvents(connect("redis://127.0.0.1:1/0", timeout_seconds=0.5)))
