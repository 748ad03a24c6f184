"""Every invariant holds in a good history and is broken by a bad one: else the check is worth nothing."""

import hashlib
from pathlib import Path

import pytest
from redis import Redis

from service.storage import new_job_id
from tests.chaos.history import Call, History, Window
from tests.chaos.invariants import (
    backward_moves,
    differing_downloads,
    leftovers,
    require,
    unexcused_errors,
    unfinished_jobs,
    wrongly_published,
)

JOB = new_job_id()
MASKS = b"masks"
REFERENCES = {"clip": hashlib.sha256(MASKS).hexdigest()}


class Story(History):
    """A history told call by call; every call takes a second and none overlap unless said so."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def tell(self, method: str, path: str, status_code: int | None, **facts: object) -> "Story":
        self.now += 2
        result = "unknown" if status_code is None else "ok" if status_code < 400 else "failed"
        given = {"began_at": self.now, "ended_at": self.now + 1, "job_id": JOB, **facts}
        self.add(
            Call(client="c", method=method, path=path, result=result, status_code=status_code, **given)  # type: ignore[arg-type]
        )
        return self

    def posted(self, sent: str = "clip") -> "Story":
        return self.tell("POST", "/jobs", 202, job_status="queued", attempt=0, sent=sent)

    def seen(self, status: str, attempt: int = 1, **facts: object) -> "Story":
        return self.tell("GET", f"/jobs/{JOB}", 200, job_status=status, attempt=attempt, **facts)

    def downloaded(self, content: bytes = MASKS) -> "Story":
        digest = hashlib.sha256(content).hexdigest()
        return self.tell("GET", f"/jobs/{JOB}/artifacts/masks.zip", 200, received=digest)

    def deleted(self, status_code: int | None = 204) -> "Story":
        return self.tell("DELETE", f"/jobs/{JOB}", status_code)


def published(data_dir: Path, *contents: bytes) -> Path:
    for number, content in enumerate(contents):
        archive = data_dir / "jobs" / JOB / f"artifacts-{number}" / "masks.zip"
        archive.parent.mkdir(parents=True)
        archive.write_bytes(content)
    return data_dir


def test_require_fails_if_and_only_if_there_is_a_violation() -> None:
    require([])
    with pytest.raises(AssertionError, match="this and that"):
        require(["this and that"])


# -- I1 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["succeeded", "failed", "canceled"])
def test_a_job_that_ended_is_finished(end: str) -> None:
    assert unfinished_jobs(Story().posted().seen("running").seen(end)) == []


def test_a_job_that_was_deleted_need_not_end() -> None:
    assert unfinished_jobs(Story().posted().deleted()) == []


@pytest.mark.parametrize(
    "story",
    [
        Story().posted(),
        Story().posted().seen("running"),
        Story().posted().seen("canceling"),
        Story().posted().deleted(None),
        Story().posted().deleted(503),
    ],
)
def test_a_promise_that_was_not_kept_is_found(story: Story) -> None:
    assert unfinished_jobs(story)


# -- I2 --------------------------------------------------------------------------------------------------


def test_the_masks_of_an_undisturbed_run_are_right() -> None:
    story = Story().posted().seen("succeeded").downloaded().downloaded()
    assert differing_downloads(story, REFERENCES) == []


@pytest.mark.parametrize(
    "story",
    [
        Story().posted().seen("succeeded").downloaded(b"torn"),
        Story().posted().seen("succeeded").downloaded().downloaded(b"torn"),
        Story().posted("something else").seen("succeeded").downloaded(),
        Story().posted().seen("canceled").downloaded(),
        Story().posted().downloaded().seen("failed"),
    ],
)
def test_masks_that_differ_or_ought_not_to_be_are_found(story: Story) -> None:
    assert differing_downloads(story, REFERENCES)


def test_one_right_archive_is_well_published(tmp_path: Path) -> None:
    story = Story().posted().seen("succeeded")
    assert wrongly_published(story, REFERENCES, published(tmp_path, MASKS)) == []


def test_a_job_that_did_not_succeed_has_no_archive(tmp_path: Path) -> None:
    assert wrongly_published(Story().posted().seen("canceled"), REFERENCES, tmp_path) == []


def test_of_a_job_that_was_deleted_nothing_is_asked(tmp_path: Path) -> None:
    assert wrongly_published(Story().posted().seen("succeeded").deleted(), REFERENCES, tmp_path) == []


@pytest.mark.parametrize(
    ("end", "contents"),
    [
        ("succeeded", []),
        ("succeeded", [MASKS, MASKS]),
        ("succeeded", [b"torn"]),
        ("canceled", [MASKS]),
        ("failed", [MASKS]),
    ],
)
def test_an_archive_too_many_too_few_or_wrong_is_found(
    tmp_path: Path, end: str, contents: list[bytes]
) -> None:
    assert wrongly_published(Story().posted().seen(end), REFERENCES, published(tmp_path, *contents))


# -- I3 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "story",
    [
        Story().posted().seen("queued", 0).seen("running").seen("running").seen("succeeded"),
        Story().posted().seen("running").seen("queued").seen("running", 2).seen("failed", 2),
        Story().posted().seen("running").seen("canceling").seen("canceled").seen("canceled"),
        Story().posted().seen("running").deleted().tell("GET", f"/jobs/{JOB}", 410),
        Story().posted().seen("succeeded").seen("running", began_at=3.0),
    ],
)
def test_moving_forward_is_right(story: Story) -> None:
    assert backward_moves(story) == []


@pytest.mark.parametrize(
    "story",
    [
        Story().posted().seen("succeeded").seen("running"),
        Story().posted().seen("succeeded").seen("queued"),
        Story().posted().seen("succeeded").seen("failed"),
        Story().posted().seen("canceled").seen("succeeded"),
        Story().posted().seen("canceling").seen("running"),
        Story().posted().seen("canceling").seen("succeeded"),
        Story().posted().seen("running", 2).seen("running", 1),
        Story().posted().seen("running").seen("queued").seen("running"),
        Story().posted().deleted().seen("running"),
    ],
)
def test_moving_backward_is_found(story: Story) -> None:
    assert backward_moves(story)


# -- I4 --------------------------------------------------------------------------------------------------


def test_tombstones_and_what_belongs_to_a_kept_job_may_stay(tmp_path: Path, redis: Redis) -> None:
    (published(tmp_path, MASKS) / "tombstones").mkdir()
    (tmp_path / "tombstones" / new_job_id()).touch()
    redis.set(f"imcnet:job:{JOB}", 1)
    redis.set("imcnet:worker:host-0123456789ab", 1)
    assert leftovers(tmp_path, redis, kept=[JOB]) == []
    assert len(leftovers(tmp_path, redis)) == 2


@pytest.mark.parametrize("name", [f"jobs/{JOB}", "uploads/some.part", f"trash/{JOB}-1"])
def test_files_that_nobody_needs_are_found(tmp_path: Path, redis: Redis, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert leftovers(tmp_path, redis)


@pytest.mark.parametrize("name", [f"rq:job:{JOB}-0a1b", f"imcnet:lease:{JOB}", JOB])
def test_keys_that_nobody_needs_are_found(tmp_path: Path, redis: Redis, name: str) -> None:
    redis.set(name, 1)
    assert leftovers(tmp_path, redis)


# -- I5 --------------------------------------------------------------------------------------------------


class Window503(Story):
    """One call, from 2 to 3, that was answered with 503."""

    def __init__(self, began_at: float, ended_at: float) -> None:
        super().__init__()
        self.tell("GET", "/jobs", 503)
        self._windows.append(Window(fault="cut", began_at=began_at, ended_at=ended_at))


def test_errors_of_the_client_are_no_fault_of_the_service() -> None:
    assert unexcused_errors(Story().posted().tell("GET", "/jobs/x", 404).tell("POST", "/jobs", 429)) == []


@pytest.mark.parametrize(("began_at", "ended_at"), [(0.0, 9.0), (2.5, 2.6), (0.0, 2.1), (2.9, 9.0)])
def test_an_error_while_a_fault_was_at_work_is_excused(began_at: float, ended_at: float) -> None:
    assert unexcused_errors(Window503(began_at, ended_at)) == []


@pytest.mark.parametrize(
    "story",
    [
        Story().tell("GET", "/jobs", 500),
        Story().tell("GET", "/jobs", None),
        Window503(0.0, 1.9),
        Window503(3.1, 9.0),
    ],
)
def test_an_error_without_a_fault_is_found(story: Story) -> None:
    assert unexcused_errors(story)
