import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import PROBLEMS, EngineFailed, ImcnetError
from service.jobs import (
    Artifact,
    Attempt,
    AttemptEnd,
    AttemptRecord,
    Job,
    JobInput,
    JobOptions,
    JobRecord,
    JobStatus,
    Outcome,
    Problem,
    Progress,
    QueueState,
    describe,
    failures,
    given_up,
    is_lost_cause,
    read_stored,
)

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
JOB_ID = "0190b0aa-0000-7000-8000-000000000001"
RECORD = JobRecord(
    id=JOB_ID,
    created_at=NOON,
    options=JobOptions(),
    input=JobInput(
        width=64,
        height=48,
        rotation=0,
        fps=25.0,
        frames=10,
        duration_s=0.4,
        container="mov",
        codec="h264",
        filename="a.mp4",
        bytes=123,
        sha256="0" * 64,
    ),
)


def attempt(number: int, end: AttemptEnd | None) -> Attempt:
    record = AttemptRecord(delivery="d", worker="w", started_at=NOON)
    return Attempt(number=number, end=end, directory=Path("x"), record=record)


def shown(
    outcome: Outcome | None,
    state: QueueState | None,
    *,
    attempts: Sequence[Attempt] = (),
    root_path: str = "",
) -> Job:
    return describe(RECORD, outcome, attempts, state, retention=timedelta(hours=24), root_path=root_path)


def ended(status: JobStatus, **fields: object) -> Outcome:
    return Outcome.model_validate({"status": status, "finished_at": NOON + timedelta(minutes=1), **fields})


def test_an_accepted_job_that_the_queue_does_not_know_is_still_queued() -> None:
    assert shown(None, None).status is JobStatus.QUEUED


def test_a_queued_job_shows_its_position() -> None:
    job = shown(None, QueueState(position=3, workers_alive=1))
    assert (job.status, job.queue_position, job.warnings) == (JobStatus.QUEUED, 3, ())


def test_a_queued_job_says_that_no_worker_is_alive() -> None:
    job = shown(None, QueueState(position=1, workers_alive=0))
    assert [warning.code for warning in job.warnings] == ["no_worker"]


def test_a_running_job_shows_its_progress() -> None:
    progress = Progress(phase="segmenting", frames_done=4, frames_total=16, fps=2.0)
    job = shown(
        None,
        QueueState(leased=True, progress=progress, workers_alive=1),
        attempts=[attempt(1, AttemptEnd.LOST), attempt(2, None)],
    )
    assert job.status is JobStatus.RUNNING
    assert (job.attempt, job.started_at) == (2, NOON)
    assert (job.progress.percent, job.progress.eta_s) == (25.0, 6.0)


def test_a_job_between_two_attempts_is_queued_again() -> None:
    job = shown(None, QueueState(position=1, workers_alive=1), attempts=[attempt(1, AttemptEnd.CRASHED)])
    assert (job.status, job.attempt, job.queue_position) == (JobStatus.QUEUED, 1, 1)


def test_attempts_that_were_given_back_use_nothing_up() -> None:
    preempted = [attempt(number, AttemptEnd.PREEMPTED) for number in range(1, 9)]
    crashed = attempt(9, AttemptEnd.CRASHED)
    assert failures([*preempted, crashed, attempt(10, None)]) == 1
    assert not is_lost_cause([*preempted, crashed], max_attempts=2)
    assert is_lost_cause([*preempted, crashed], max_attempts=1)
    assert not is_lost_cause([], max_attempts=1)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (AttemptEnd.LOST, "worker_crashed"),
        (AttemptEnd.ENGINE_FAILED, "engine_failed"),
        (AttemptEnd.STORAGE_FULL, "storage_full"),
    ],
)
def test_a_job_that_is_given_up_tells_by_what_its_last_attempt_failed(end: AttemptEnd, code: str) -> None:
    outcome = given_up([attempt(1, AttemptEnd.PREEMPTED), attempt(2, end)])
    assert outcome.error is not None
    assert (outcome.error.code, outcome.attempt, outcome.started_at) == (code, 2, NOON)


def test_the_diagnosis_of_a_poisonous_job_names_every_attempts_end() -> None:
    outcome = given_up([attempt(1, AttemptEnd.LOST), attempt(2, AttemptEnd.CRASHED)])
    assert outcome.error is not None
    assert "1: lost, 2: crashed" in outcome.error.detail


def test_progress_makes_no_claim_where_the_total_is_unknown() -> None:
    progress = Progress(phase="segmenting", frames_done=4, fps=2.0)
    assert (progress.percent, progress.eta_s) == (None, None)


def test_the_outcome_decides_whatever_the_queue_says() -> None:
    for status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        assert shown(ended(status), QueueState(leased=True)).status is status


def test_a_canceled_job_is_canceling_until_its_worker_has_let_go() -> None:
    outcome = ended(JobStatus.CANCELED)
    assert shown(outcome, QueueState(leased=True)).status is JobStatus.CANCELING
    assert shown(outcome, None).status is JobStatus.CANCELED
    assert shown(outcome, QueueState()).status is JobStatus.CANCELED


def test_a_succeeded_job_tells_counted_frames_and_where_its_artifacts_are() -> None:
    artifact = Artifact(name="masks.zip", media_type="application/zip", bytes=1, sha256="1" * 64)
    job = shown(
        ended(JobStatus.SUCCEEDED, frames=12, artifacts=(artifact,), workspace="attempt-x"),
        None,
        root_path="/v",
    )
    assert job.input.frames == 12
    assert job.progress.percent == 100
    assert job.artifacts[0].url == f"/v/jobs/{JOB_ID}/artifacts/masks.zip"
    assert job.links.self == f"/v/jobs/{JOB_ID}"
    assert job.expires_at == NOON + timedelta(minutes=1, hours=24)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0},
        {"threshold": 1},
        {"threshold": "x"},
        {"max_side": 15},
        {"quality": "best"},
        {"artifacts": []},
        {"colour": 1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        JobOptions.model_validate(options)


def test_artifacts_asked_for_twice_are_made_once() -> None:
    options = JobOptions.model_validate({"artifacts": ["overlay", "masks", "overlay"]})
    assert [kind.value for kind in options.artifacts] == ["masks", "overlay"]


def test_every_error_class_has_its_row_in_the_table() -> None:
    pending = [ImcnetError]
    while pending:
        kind = pending.pop()
        assert kind.code in PROBLEMS, kind
        pending += kind.__subclasses__()


def test_a_problem_carries_code_title_and_detail() -> None:
    problem = Problem.of(EngineFailed("It died."))
    assert (problem.code, problem.detail, problem.status) == ("engine_failed", "It died.", None)


def test_a_record_of_before_there_were_qualities_is_an_exact_job() -> None:
    older = RECORD.model_dump(mode="json")
    del older["options"]["quality"]
    assert JobRecord.model_validate(older).options.quality == "exact"


def test_what_another_release_has_added_to_a_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    newer = {**RECORD.model_dump(mode="json"), "priority": 7}
    newer["options"] = {**newer["options"], "colour": "red"}
    path.write_text(json.dumps(newer))
    assert read_stored(JobRecord, path) == RECORD


@pytest.mark.parametrize(("name", "kind"), [("job.json", JobRecord), ("outcome.json", Outcome)])
def test_the_records_of_the_first_release_are_read_and_nothing_in_them_has_another_name_since(
    name: str, kind: type[JobRecord] | type[Outcome]
) -> None:
    """What it stored lies in ``records/``. Fields may be added: the release before this passes them over."""
    path = Path(__file__).parent / "records" / name
    stored = json.loads(path.read_text())
    record = read_stored(kind, path)
    written = json.loads(record.model_dump_json())
    assert {name: written[name] for name in stored} == stored
    assert all(written[name] is None for name in written.keys() - stored.keys())


def test_an_outcome_of_before_engines_told_their_quality_is_read() -> None:
    outcome = ended(JobStatus.SUCCEEDED, engine={"name": "torch-float32", "device": "cpu"})
    assert outcome.engine is not None
    assert outcome.engine.quality is None


def test_record_and_outcome_survive_json() -> None:
    outcome = ended(JobStatus.FAILED, error=Problem.of(EngineFailed("It died.")), attempt=3)
    assert JobRecord.model_validate_json(RECORD.model_dump_json()) == RECORD
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome
