import fcntl
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest

from service.errors import ArtifactNotFound, ArtifactNotReady, JobGone, JobNotFound
from service.jobs import Artifact, JobRecord, JobStatus, Outcome, utc_now
from service.storage import JobStorage, new_job_id
from tests.service.test_jobs import RECORD


def accepted(storage: JobStorage) -> JobRecord:
    upload = storage.new_upload()
    upload.write_bytes(b"video")
    record = RECORD.model_copy(update={"id": new_job_id()})
    storage.accept(record, upload)
    return record


def succeeded(workspace: str | None = None, *names: str) -> Outcome:
    artifacts = tuple(
        Artifact(name=name, media_type="application/zip", bytes=1, sha256="0" * 64) for name in names
    )
    return Outcome(
        status=JobStatus.SUCCEEDED, finished_at=utc_now(), workspace=workspace, artifacts=artifacts
    )


def canceled() -> Outcome:
    return Outcome(status=JobStatus.CANCELED, finished_at=utc_now())


def test_accepting_moves_the_upload_and_keeps_the_record(storage: JobStorage) -> None:
    record = accepted(storage)
    assert storage.load(record.id) == record
    assert storage.source(record.id).read_bytes() == b"video"
    assert not list(storage.uploads.iterdir())


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
    for look in (storage.load, storage.outcome, storage.source, storage.settled):
        with pytest.raises(JobNotFound):
            look(job_id)


def test_only_the_first_outcome_counts(storage: JobStorage) -> None:
    record = accepted(storage)
    assert not storage.settled(record.id)
    assert storage.conclude(record.id, canceled())
    assert not storage.conclude(record.id, succeeded())
    outcome = storage.outcome(record.id)
    assert outcome is not None
    assert outcome.status is JobStatus.CANCELED
    assert storage.settled(record.id)


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
    names = {entry.name for entry in storage.source(record.id).parent.iterdir()}
    assert names == {"job.json", "outcome.json"}


def test_the_original_is_removed_at_the_end_unless_it_is_to_be_kept(storage: JobStorage) -> None:
    removed, kept = accepted(storage), accepted(storage)
    storage.conclude(removed.id, canceled())
    storage.conclude(kept.id, canceled(), keep_source=True)
    assert not storage.source(removed.id).exists()
    assert storage.source(kept.id).exists()


def test_an_attempt_leaves_nothing_unless_its_outcome_was_published(storage: JobStorage) -> None:
    record = accepted(storage)
    with storage.attempt(record.id) as lost:
        (lost / "masks.zip").write_bytes(b"x")
    assert not lost.exists()
    with storage.attempt(record.id) as won:
        (won / "masks.zip").write_bytes(b"x")
        storage.conclude(record.id, succeeded(won.name, "masks.zip"))
    artifact, path = storage.artifact(record.id, "masks.zip")
    assert artifact.name == "masks.zip"
    assert path.read_bytes() == b"x"


def test_artifacts_are_told_apart_as_not_ready_and_not_there(storage: JobStorage) -> None:
    record = accepted(storage)
    with pytest.raises(ArtifactNotReady):
        storage.artifact(record.id, "masks.zip")
    storage.conclude(record.id, succeeded("attempt-x", "masks.zip"))
    for name in ("overlay.mp4", "../job.json", "outcome.json"):
        with pytest.raises(ArtifactNotFound):
            storage.artifact(record.id, name)


def test_a_removed_job_is_gone_and_later_unknown(storage: JobStorage) -> None:
    record = accepted(storage)
    storage.remove(record.id)
    storage.remove(record.id)
    with pytest.raises(JobGone):
        storage.load(record.id)
    assert storage.settled(record.id)
    assert not storage.conclude(record.id, canceled())
    storage.sweep_leftovers(upload_idle_seconds=0, tombstone_seconds=-1)
    with pytest.raises(JobNotFound):
        storage.load(record.id)
    assert not [path for path in storage.root.rglob("*") if path.is_file()]


def test_a_job_that_never_was_is_not_settled_but_unknown(storage: JobStorage) -> None:
    with pytest.raises(JobNotFound):
        storage.settled(new_job_id())


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
        assert storage.settled(record.id)


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
