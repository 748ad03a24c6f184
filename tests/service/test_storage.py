import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from service.errors import (
    ArtifactNotFound,
    ArtifactNotReady,
    AttemptRefused,
    JobGone,
    JobNotFound,
    StorageUnavailable,
)
from service.jobs import Artifact, Attempt, AttemptEnd, JobRecord, JobStatus, Outcome, utc_now
from service.storage import JobStorage, new_job_id
from tests.service.test_jobs import RECORD


def accepted(storage: JobStorage) -> JobRecord:
    upload = storage.new_upload()
    upload.write_bytes(b"video")
    record = RECORD.model_copy(update={"id": new_job_id()})
    storage.accept(record, upload)
    return record


def begun(storage: JobStorage, record: JobRecord) -> Attempt:
    return storage.begin(record.id, delivery="delivery", worker="worker")


def made(attempt: Attempt, *names: str) -> Outcome:
    """The outcome of an attempt that has made artifacts of these names."""
    (attempt.directory / "artifacts").mkdir()
    for name in names:
        (attempt.directory / "artifacts" / name).write_bytes(b"x")
    artifacts = tuple(
        Artifact(name=name, media_type="application/zip", bytes=1, sha256="0" * 64) for name in names
    )
    return Outcome(status=JobStatus.SUCCEEDED, finished_at=utc_now(), artifacts=artifacts)


def failed() -> Outcome:
    return Outcome(status=JobStatus.FAILED, finished_at=utc_now())


def names_in(storage: JobStorage, record: JobRecord) -> set[str]:
    return {entry.name for entry in storage.source(record.id).parent.iterdir()}


def canceled() -> Outcome:
    return Outcome(status=JobStatus.CANCELED, finished_at=utc_now())


def test_accepting_moves_the_upload_and_keeps_the_record(storage: JobStorage) -> None:
    record = accepted(storage)
    assert storage.load(record.id) == record
    assert storage.source(record.id).read_bytes() == b"video"
    assert not list(storage.uploads.iterdir())


def test_a_job_that_cannot_be_made_to_last_is_not_accepted(
    storage: JobStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses the last step, after which all could see the job."""
    synced = []

    def sync(path: Path) -> None:
        synced.append(path.name)
        if path.name == "jobs":
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("service.storage.sync", sync)
    upload = storage.new_upload()
    upload.write_bytes(b"video")
    record = RECORD.model_copy(update={"id": new_job_id()})
    with pytest.raises(StorageUnavailable):
        storage.accept(record, upload)
    assert synced[-1] == "jobs"
    assert list(storage.job_ids()) == []
    assert upload.read_bytes() == b"video"
    assert not [*(storage.root / "trash").iterdir()]


def test_job_ids_are_listed_newest_first_and_from_a_cursor_on(storage: JobStorage) -> None:
    ids = []
    for _ in range(3):
        ids.append(accepted(storage).id)
        time.sleep(0.002)  # ids of one millisecond are in no order
    assert list(storage.job_ids()) == ids[::-1]
    assert list(storage.job_ids(before=ids[1])) == ids[:1]


@pytest.mark.parametrize("job_id", ["../jobs", "x", "", "a\0b", "..", "0" * 300, new_job_id().upper()])
def test_what_is_no_job_id_is_no_path(storage: JobStorage, job_id: str) -> None:
    accepted(storage)
    for look in (storage.load, storage.outcome, storage.source, storage.has_ended, storage.attempts):
        with pytest.raises(JobNotFound):
            look(job_id)


def test_only_the_first_outcome_counts(storage: JobStorage) -> None:
    record = accepted(storage)
    assert not storage.has_ended(record.id)
    assert storage.conclude(record.id, canceled())
    assert not storage.conclude(record.id, failed())
    outcome = storage.outcome(record.id)
    assert outcome is not None
    assert outcome.status is JobStatus.CANCELED
    assert storage.has_ended(record.id)


def test_of_many_that_end_a_job_at_once_exactly_one_decides(storage: JobStorage) -> None:
    record = accepted(storage)
    barrier = threading.Barrier(8)
    decided: list[bool] = []

    def conclude() -> None:
        barrier.wait()
        decided.append(storage.conclude(record.id, canceled()))

    threads = [threading.Thread(target=conclude) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(decided) == [False] * 7 + [True]
    assert names_in(storage, record) == {"job.json", "outcome.json"}


def test_the_original_is_removed_at_the_end_unless_it_is_to_be_kept(storage: JobStorage) -> None:
    removed, kept = accepted(storage), accepted(storage)
    storage.conclude(removed.id, canceled())
    storage.conclude(kept.id, canceled(), keep_source=True)
    assert not storage.source(removed.id).exists()
    assert storage.source(kept.id).exists()


def test_a_live_attempt_publishes_what_it_has_made_and_leaves_nothing_else(storage: JobStorage) -> None:
    record = accepted(storage)
    attempt = begun(storage, record)
    assert storage.lives(attempt)
    (storage.spans(attempt, "key") / "000000").mkdir(parents=True)
    assert storage.publish(attempt, made(attempt, "masks.zip"))
    assert not storage.lives(attempt)
    artifact, path = storage.artifact(record.id, "masks.zip")
    assert (artifact.name, path.read_bytes()) == ("masks.zip", b"x")
    assert names_in(storage, record) == {"job.json", "outcome.json", "artifacts-0001"}
    assert storage.attempts(record.id) == []


def test_only_one_attempt_lives_at_a_time(storage: JobStorage) -> None:
    record = accepted(storage)
    attempt = begun(storage, record)
    with pytest.raises(AttemptRefused):
        begun(storage, record)
    assert storage.attempts(record.id) == [attempt]
    assert attempt.number == 1


def test_of_many_that_begin_at_once_exactly_one_does(storage: JobStorage) -> None:
    def begin(record: JobRecord, barrier: threading.Barrier, numbers: list[int | None]) -> None:
        barrier.wait()
        try:
            numbers.append(begun(storage, record).number)
        except AttemptRefused:
            numbers.append(None)

    for _ in range(20):
        numbers: list[int | None] = []
        arguments = (accepted(storage), threading.Barrier(4), numbers)
        threads = [threading.Thread(target=begin, args=arguments) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(numbers) == 4
        assert [number for number in numbers if number] == [1]


def test_an_attempt_that_was_ended_can_publish_nothing(storage: JobStorage) -> None:
    record = accepted(storage)
    stale = begun(storage, record)
    success = made(stale, "masks.zip")
    assert storage.end(stale, AttemptEnd.LOST)
    assert not storage.end(stale, AttemptEnd.CRASHED)
    assert not storage.lives(stale)
    assert not storage.publish(stale, success)
    assert not storage.publish(stale, failed())
    assert storage.outcome(record.id) is None
    second = begun(storage, record)
    assert [(a.number, a.end) for a in storage.attempts(record.id)] == [(1, AttemptEnd.LOST), (2, None)]
    assert storage.publish(second, made(second, "masks.zip"))
    assert not storage.publish(stale, success)
    assert names_in(storage, record) == {"job.json", "outcome.json", "artifacts-0002"}


def test_what_an_ended_attempt_has_made_is_removed_but_not_the_spans(storage: JobStorage) -> None:
    record = accepted(storage)
    attempt = begun(storage, record)
    (attempt.directory / "draft").write_bytes(b"x")
    spans = storage.spans(attempt, "key")
    spans.mkdir()
    storage.end(attempt, AttemptEnd.PREEMPTED)
    assert [path.name for path in storage.attempts(record.id)[0].directory.iterdir()] == ["attempt.json"]
    assert spans.is_dir()


def test_a_cancel_in_the_middle_of_an_attempt_wins(storage: JobStorage) -> None:
    record = accepted(storage)
    attempt = begun(storage, record)
    success = made(attempt, "masks.zip")
    assert storage.conclude(record.id, canceled())
    assert not storage.lives(attempt)
    assert not storage.publish(attempt, success)
    with pytest.raises(ArtifactNotReady):
        storage.artifact(record.id, "masks.zip")
    assert names_in(storage, record) == {"job.json", "outcome.json"}


def test_a_job_that_has_ended_or_is_gone_cannot_be_begun(storage: JobStorage) -> None:
    ended, removed = accepted(storage), accepted(storage)
    storage.conclude(ended.id, canceled())
    storage.remove(removed.id)
    with pytest.raises(AttemptRefused):
        begun(storage, ended)
    with pytest.raises(JobGone):
        begun(storage, removed)
    with pytest.raises(JobNotFound):
        storage.begin(new_job_id(), delivery="d", worker="w")


def test_a_record_that_only_a_newer_release_gets_right_is_left_to_it(storage: JobStorage) -> None:
    record = accepted(storage)
    path = storage.source(record.id).parent / "job.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2,"novelty":{"a":1}'))
    assert storage.load(record.id).version == 2
    with pytest.raises(AttemptRefused, match="newer release"):
        begun(storage, record)


def test_what_a_worker_that_died_while_publishing_has_left_is_tidied(storage: JobStorage) -> None:
    record = accepted(storage)
    attempt = begun(storage, record)
    assert storage.publish(attempt, made(attempt, "masks.zip"))
    outcome = storage.outcome(record.id)
    assert outcome is not None
    directory = storage.source(record.id).parent
    for name in ("attempt-0001", "ended-0000-lost", "artifacts-0000", "spans-key"):
        (directory / name).mkdir()
    storage.source(record.id).touch()
    storage.tidy(record.id, outcome)
    assert names_in(storage, record) == {"job.json", "outcome.json", "artifacts-0001"}


def test_all_who_share_a_directory_know_it_by_one_identity(storage: JobStorage, tmp_path: Path) -> None:
    again, other = JobStorage(storage.root), JobStorage(tmp_path / "other")
    again.prepare()
    other.prepare()
    assert storage.identity == again.identity != other.identity


def test_artifacts_are_told_apart_as_not_ready_and_not_there(storage: JobStorage) -> None:
    record = accepted(storage)
    with pytest.raises(ArtifactNotReady):
        storage.artifact(record.id, "masks.zip")
    attempt = begun(storage, record)
    storage.publish(attempt, made(attempt, "masks.zip"))
    for name in ("overlay.mp4", "../job.json", "outcome.json"):
        with pytest.raises(ArtifactNotFound):
            storage.artifact(record.id, name)


def test_a_removed_job_is_gone_and_later_unknown(storage: JobStorage) -> None:
    record = accepted(storage)
    storage.remove(record.id)
    storage.remove(record.id)
    with pytest.raises(JobGone):
        storage.load(record.id)
    assert storage.has_ended(record.id)
    assert not storage.conclude(record.id, canceled())
    storage.sweep_leftovers(upload_idle_seconds=0, tombstone_seconds=-1)
    with pytest.raises(JobNotFound):
        storage.load(record.id)
    assert [path.name for path in storage.root.rglob("*") if path.is_file()] == ["identity"]


def test_ending_and_removing_a_job_at_once_is_no_error(storage: JobStorage) -> None:
    for _ in range(50):
        record = accepted(storage)
        barrier = threading.Barrier(3)
        errors: list[BaseException] = []
        calls = [
            partial(storage.conclude, record.id, canceled()),
            partial(storage.remove, record.id),
            partial(storage.remove, record.id),
        ]

        def run(call: Callable[[], object], barrier: threading.Barrier, errors: list[BaseException]) -> None:
            barrier.wait()
            try:
                call()
            except BaseException as error:  # a thread's own would be lost
                errors.append(error)

        threads = [threading.Thread(target=run, args=(call, barrier, errors)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert storage.has_ended(record.id)


def test_an_upload_that_is_still_being_received_is_not_swept_however_slow(storage: JobStorage) -> None:
    slow = storage.new_upload()
    with slow.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(slow, (0, 0))
        storage.sweep_leftovers(upload_idle_seconds=60, tombstone_seconds=60)
        assert slow.exists()
    storage.sweep_leftovers(upload_idle_seconds=60, tombstone_seconds=60)
    assert not slow.exists()


def test_left_over_uploads_are_swept_once_they_are_old(storage: JobStorage) -> None:
    old, young = storage.new_upload(), storage.new_upload()
    for path in (old, young):
        path.write_bytes(b"half a video")
    hour_ago = time.time() - timedelta(hours=1).total_seconds()
    os.utime(old, (hour_ago, hour_ago))
    storage.sweep_leftovers(upload_idle_seconds=60, tombstone_seconds=60)
    assert list(storage.uploads.iterdir()) == [young]
