"""`imcnet jobs`, on a real Redis and real files."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from redis import Redis
from typer.testing import CliRunner

from service.cli import app
from service.errors import ImcnetError, Misconfigured, QueueUnavailable
from service.jobs import Attempt, AttemptEnd, JobRecord, JobStatus, Outcome, Problem, Progress, utc_now
from service.queue import JobQueue
from service.storage import JobStorage, new_job_id
from tests.service import test_cli
from tests.service.test_queue import taken, waiting_deliveries
from tests.service.test_storage import accepted, canceled, made


@pytest.fixture
def queue(redis: Redis, storage: JobStorage) -> JobQueue:
    queue = JobQueue(redis, lease_seconds=60)
    queue.serve(storage.identity)
    return queue


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, storage: JobStorage, queue: JobQueue, redis_url: str) -> None:
    monkeypatch.setenv("IMCNET_DATA_DIR", str(storage.root))
    monkeypatch.setenv("IMCNET_REDIS_URL", redis_url)


@pytest.fixture
def redis_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _settings: None) -> None:
    monkeypatch.setenv("IMCNET_REDIS_URL", f"unix://{tmp_path}/none")


def jobs(*arguments: str) -> Result:
    """What `imcnet jobs` does where all goes well."""
    result = CliRunner().invoke(app, ["jobs", *arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def shown(*arguments: str) -> Any:
    return json.loads(jobs(*arguments, "--json").stdout)


def refusal(*arguments: str) -> ImcnetError:
    """What `imcnet jobs` ends with; `main` makes a line on stderr of it."""
    result = CliRunner().invoke(app, ["jobs", *arguments])
    assert isinstance(result.exception, ImcnetError), result.output
    return result.exception


def waiting(storage: JobStorage, queue: JobQueue) -> JobRecord:
    record = accepted(storage)
    queue.deliver(record.id)
    return record


def running(storage: JobStorage, queue: JobQueue, redis: Redis) -> tuple[JobRecord, Attempt]:
    """A job that a worker is at; call it before others wait."""
    record = waiting(storage, queue)
    attempt = storage.begin(record.id, delivery=taken(redis), worker="a-host-1")
    queue.begun(record.id, attempt)
    redis.delete("rq:queue:imcnet:intermediate")  # as RQ does when the horse begins
    return record, attempt


def failed(storage: JobStorage) -> JobRecord:
    record = accepted(storage)
    error = Problem(title="t", detail="d", code="worker_crashed")
    storage.conclude(record.id, Outcome(status=JobStatus.FAILED, finished_at=utc_now(), error=error))
    return record


def status_of(storage: JobStorage, record: JobRecord) -> JobStatus | None:
    outcome = storage.outcome(record.id)
    return None if outcome is None else outcome.status


# -- list ------------------------------------------------------------------------------------------------


def test_the_list_says_of_each_job_where_it_is(storage: JobStorage, queue: JobQueue, redis: Redis) -> None:
    runs, attempt = running(storage, queue, redis)
    queue.report(runs.id, Progress(phase="segmenting", frames_done=3, frames_total=9, fps=1.5))
    ended, waits = failed(storage), waiting(storage, queue)
    head, *lines = jobs("list").stdout.splitlines()
    assert head.split() == ["JOB", "STATUS", "ATTEMPT", "AGE", "PLACE", "WORKER", "ERROR"]
    assert {line.split()[0]: line.split()[1:] for line in lines} == {
        runs.id: ["running", "1", "0s", "3/9", "frames", "a-host-1"],
        waits.id: ["queued", "0", "0s", "#1", "in", "the", "queue"],
        ended.id: ["failed", "0", "0s", "worker_crashed"],
    }
    assert [line.split()[0] for line in lines] == sorted((runs.id, ended.id, waits.id), reverse=True)
    assert jobs().stdout == jobs("list").stdout
    facts = {line["id"]: line for line in shown("list")}
    assert facts[runs.id]["leased"] is True
    assert (facts[runs.id]["worker"], facts[runs.id]["frames_done"]) == (attempt.record.worker, 3)
    assert facts[waits.id]["queue_position"] == 1
    assert facts[ended.id]["error"] == "worker_crashed"


def test_the_list_can_be_of_one_status_and_short(storage: JobStorage, queue: JobQueue) -> None:
    ended = failed(storage)
    for _ in range(3):
        waiting(storage, queue)
    assert [line["id"] for line in shown("list", "--status", "failed")] == [ended.id]
    result = jobs("list", "--limit", "2")
    assert len(result.stdout.splitlines()) == 1 + 2
    assert "--limit" in result.stderr
    assert "--limit" not in jobs("list", "--limit", "4").stderr


def test_a_job_that_nobody_would_come_to_is_seen_in_the_list(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    _, attempt = running(storage, queue, redis)
    accepted(storage)
    redis.delete(f"imcnet:lease:{attempt.record.delivery}")
    lost, silent = jobs("list").stdout.splitlines()[1:]
    assert "not in the queue" in lost
    assert "a-host-1 (no lease)" in silent


def test_a_lease_that_was_taken_again_after_redis_was_emptied_counts(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, attempt = running(storage, queue, redis)
    redis.flushall()
    queue.renew(record.id, attempt.record.delivery, attempt.record.worker)
    assert "no lease" not in jobs("list").stdout


def test_without_redis_the_list_says_what_is_not_known(
    storage: JobStorage, queue: JobQueue, redis: Redis, redis_gone: None
) -> None:
    running(storage, queue, redis)
    waiting(storage, queue)
    storage.conclude(accepted(storage).id, canceled())
    result = jobs("list")
    assert result.stderr.splitlines() == [
        "imcnet: Redis does not answer: places in the queue, progress and leases are unknown"
    ]
    ended, waits, runs = (line.split() for line in result.stdout.splitlines()[1:])
    assert waits[1:] == ["queued", "0", "0s", "unknown"]
    assert runs[1:] == ["running", "1", "0s", "unknown", "a-host-1"]
    assert ended[1:] == ["canceled", "0", "0s"]


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_damaged_job_does_not_hide_the_others(storage: JobStorage, queue: JobQueue, harm: str) -> None:
    record, sound = accepted(storage), waiting(storage, queue)
    file = storage.source(record.id).parent / "job.json"
    file.write_text('{"id":') if harm == "damaged" else file.unlink()
    assert {line["id"]: line["status"] for line in shown("list")} == {
        record.id: "unreadable",
        sound.id: "queued",
    }
    assert len(jobs("list").stdout.splitlines()) == 3


def test_a_directory_that_is_none_of_ours_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IMCNET_DATA_DIR", str(tmp_path / "elsewhere"))
    assert "IMCNET_DATA_DIR" in refusal("list").detail
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("command", [["list"], ["cancel", "aaaa"], ["delete", "aaaa"], ["requeue", "aaaa"]])
def test_the_redis_of_another_data_directory_is_refused(queue: JobQueue, command: list[str]) -> None:
    queue.serve("another")
    error = refusal(*command)
    assert isinstance(error, Misconfigured)
    assert "not the data directory that the API uses" in error.detail


# -- ids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [slice(None), slice(18), slice(-8, None)], ids=["whole", "begin", "end"])
def test_a_job_is_found_by_a_part_of_its_id(storage: JobStorage, part: slice) -> None:
    ids = ["0190b0aa-0000-7000-8000-00000000000a", "0190b0aa-0001-7000-8000-00000000000b"]
    for job_id in ids:
        made_of(storage, job_id)
    for job_id in ids:
        assert shown("show", job_id[part])["id"] == job_id
        assert shown("show", job_id[part].upper())["id"] == job_id


def test_a_part_that_stands_for_several_or_no_jobs_is_refused(storage: JobStorage) -> None:
    ids = [f"0190b0aa-0000-7000-8000-00000000000{digit}" for digit in range(5)]
    for job_id in ids:
        made_of(storage, job_id)
    ambiguous = refusal("cancel", "0190b0aa").detail
    assert "5 jobs" in ambiguous
    assert ids[4] in ambiguous
    assert "There is no job ffff" in refusal("cancel", "ffff").detail
    assert all(storage.outcome(job_id) is None for job_id in ids)


def test_an_empty_part_stands_for_no_job_even_if_there_is_only_one(storage: JobStorage) -> None:
    record = accepted(storage)
    for part in ("", " ", record.id[:3]):
        assert "too short" in refusal("delete", part).detail
    assert not storage.has_ended(record.id)


def test_a_job_that_is_gone_is_called_so(storage: JobStorage) -> None:
    record = accepted(storage)
    storage.remove(record.id)
    assert "expired or was deleted" in refusal("show", record.id).detail


def test_an_unknown_job_is_one_line_on_stderr(storage: JobStorage, redis_url: str) -> None:
    result = test_cli.imcnet(
        *("jobs", "show", new_job_id()), IMCNET_REDIS_URL=redis_url, IMCNET_DATA_DIR=str(storage.root)
    )
    assert "There is no job" in test_cli.error_of(result, code=2)


def made_of(storage: JobStorage, job_id: str) -> None:
    """A job of this very id."""
    record = accepted(storage)
    directory = storage.source(record.id).parent.rename(storage.source(job_id).parent)
    text = (directory / "job.json").read_text()
    (directory / "job.json").write_text(text.replace(record.id, job_id))


# -- show ------------------------------------------------------------------------------------------------


def test_all_of_a_running_job_is_shown(storage: JobStorage, queue: JobQueue, redis: Redis) -> None:
    record, first = running(storage, queue, redis)
    storage.end(first, AttemptEnd.CRASHED)
    attempt = storage.begin(record.id, delivery=f"{record.id}-2", worker="b-host-2")
    queue.begun(record.id, attempt)
    queue.report(record.id, Progress(phase="segmenting", frames_done=3))
    for span in ("000000", "000256"):
        (storage.spans(attempt, "key") / span).mkdir(parents=True)
        (storage.spans(attempt, "key") / span / "masks").write_bytes(b"1234")
    facts = shown("show", record.id)
    assert facts["status"] == "running"
    assert facts["record"]["input"]["filename"] == record.input.filename
    assert [(a["number"], a["worker"], a["end"], a["leased"]) for a in facts["attempts"]] == [
        (1, "a-host-1", "crashed", None),
        (2, "b-host-2", None, True),
    ]
    assert facts["attempts"][1]["started_at"] == attempt.record.started_at.isoformat()
    assert facts["finished_spans"] == {"spans-key": 2}
    assert facts["outcome"] is None
    assert facts["file_bytes"]["source"] == 5
    assert facts["file_bytes"]["spans-key/000256"] == 4
    assert facts["redis"]["leased"] is True
    assert facts["redis"]["progress"]["frames_done"] == 3
    assert facts["redis"]["keys"][f"imcnet:lease:{record.id}-2"].startswith("string, ")
    assert facts["redis"]["keys"][f"imcnet:job:{record.id}"] == "hash, stays"


def test_all_of_an_ended_job_is_shown(storage: JobStorage) -> None:
    record = accepted(storage)
    attempt = storage.begin(record.id, delivery="d", worker="w")
    storage.publish(attempt, made(attempt, "masks.zip"))
    facts = shown("show", record.id)
    assert facts["status"] == facts["outcome"]["status"] == "succeeded"
    assert facts["attempts"] == []
    assert facts["file_bytes"]["artifacts-0001/masks.zip"] == 1


def test_the_same_is_shown_to_people_line_by_line(storage: JobStorage, queue: JobQueue, redis: Redis) -> None:
    record, _ = running(storage, queue, redis)
    lines = [line.split() for line in jobs("show", record.id).stdout.splitlines()]
    for line in (["id", record.id], ["status", "running"], ["worker", "a-host-1"], ["leased", "yes"]):
        assert line in lines
    assert ["outcome", "-"] in lines


def test_of_a_damaged_job_what_can_be_read_is_shown(storage: JobStorage) -> None:
    record = accepted(storage)
    (storage.source(record.id).parent / "outcome.json").write_text("{}")
    facts = shown("show", record.id)
    assert facts["status"] == "unreadable"
    assert facts["outcome"].startswith("damaged: ")
    assert facts["record"]["id"] == record.id


def test_without_redis_what_is_stored_is_shown(
    storage: JobStorage, queue: JobQueue, redis: Redis, redis_gone: None
) -> None:
    record, _ = running(storage, queue, redis)
    facts = shown("show", record.id)
    assert (facts["status"], facts["redis"], facts["attempts"][0]["leased"]) == ("running", None, None)


# -- cancel, delete --------------------------------------------------------------------------------------


def test_a_running_job_is_canceled_with_its_attempt_on_record(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, attempt = running(storage, queue, redis)
    waits = waiting(storage, queue)
    said = jobs("cancel", record.id, waits.id).stdout
    assert said.splitlines() == [f"{record.id} is canceled", f"{waits.id} is canceled"]
    outcome = storage.outcome(record.id)
    assert outcome is not None
    assert (outcome.status, outcome.attempt, outcome.started_at) == (
        JobStatus.CANCELED,
        1,
        attempt.record.started_at,
    )
    assert not storage.lives(attempt)
    assert waiting_deliveries(redis) == []
    assert shown("list", "--status", "canceling")[0]["id"] == record.id  # its worker still has the lease


def test_what_has_ended_stays_as_it_is(storage: JobStorage) -> None:
    record = failed(storage)
    assert "had ended already: failed" in jobs("cancel", record.id).stdout
    assert status_of(storage, record) is JobStatus.FAILED


def test_where_one_job_is_not_there_none_is_touched(storage: JobStorage) -> None:
    record = accepted(storage)
    for command in ("cancel", "delete"):
        refusal(command, record.id, new_job_id())
        assert not storage.has_ended(record.id)


def test_jobs_are_canceled_and_deleted_without_redis(storage: JobStorage, redis_gone: None) -> None:
    ends, goes = accepted(storage), accepted(storage)
    jobs("cancel", ends.id)
    jobs("delete", goes.id)
    assert status_of(storage, ends) is JobStatus.CANCELED
    assert list(storage.job_ids()) == [ends.id]


def test_a_deleted_job_leaves_nothing_but_its_tombstone(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record = waiting(storage, queue)
    assert jobs("delete", record.id).stdout == f"{record.id} is deleted\n"
    assert [path.name for path in storage.root.rglob(f"*{record.id}*")] == [record.id]
    assert (storage.root / "tombstones" / record.id).exists()
    assert [key for key in redis.scan_iter() if record.id.encode() in key] == []


def test_a_damaged_job_cannot_be_canceled_but_deleted(storage: JobStorage) -> None:
    record = accepted(storage)
    (storage.source(record.id).parent / "job.json").write_text("{")
    assert "are damaged" in refusal("cancel", record.id).detail
    assert "are damaged" in refusal("requeue", record.id).detail
    jobs("delete", record.id)
    assert list(storage.job_ids()) == []


# -- requeue ---------------------------------------------------------------------------------------------


def test_a_job_is_taken_from_its_worker_and_put_to_the_front(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record, attempt = running(storage, queue, redis)
    waiting(storage, queue)
    (storage.spans(attempt, "key") / "000000").mkdir(parents=True)
    assert "at the front of the queue: attempt 1 has ended" in jobs("requeue", record.id).stdout
    assert not storage.lives(attempt)
    assert [a.end for a in storage.attempts(record.id)] == [AttemptEnd.PREEMPTED]
    assert storage.spans(attempt, "key").is_dir()
    assert [delivery[:36] == record.id for delivery in waiting_deliveries(redis)] == [True, False]


def test_a_job_is_never_lost_by_being_taken_from_its_worker(
    monkeypatch: pytest.MonkeyPatch, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    monkeypatch.setenv("IMCNET_MAX_ATTEMPTS", "1")
    record, _ = running(storage, queue, redis)
    jobs("requeue", record.id)
    assert not storage.has_ended(record.id)
    assert len(waiting_deliveries(redis)) == 1


def test_a_job_that_is_nowhere_is_queued_and_one_that_waits_is_not_queued_twice(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record = accepted(storage)
    assert "at the front" in jobs("requeue", record.id).stdout
    assert "waits for a worker already" in jobs("requeue", record.id).stdout
    assert len(waiting_deliveries(redis)) == 1


def test_what_has_ended_is_not_queued_again(storage: JobStorage, redis: Redis) -> None:
    record = failed(storage)
    assert "has ended (failed)" in refusal("requeue", record.id).detail
    assert waiting_deliveries(redis) == []


def test_without_redis_no_attempt_is_taken_away(
    storage: JobStorage, queue: JobQueue, redis: Redis, redis_gone: None
) -> None:
    record, attempt = running(storage, queue, redis)
    assert isinstance(refusal("requeue", record.id), QueueUnavailable)
    assert storage.lives(attempt)
