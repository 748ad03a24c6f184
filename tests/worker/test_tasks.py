from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from redis import Redis

from service.errors import JobGone
from service.jobs import Attempt, AttemptEnd, ModelInfo
from service.queue import JobQueue
from service.reconciliation import Reconciliation
from service.storage import JobStorage
from tests.service.test_reconciliation import reconcile
from tests.service.test_storage import accepted
from worker import tasks
from worker.protocol import EngineReady
from worker.settings import WorkerSettings

DELIVERY = "01900000-0000-7000-8000-000000000000-0badcafe"


class LookedAtMeanwhile(JobStorage):
    """A storage in which an attempt is looked after the moment that it exists, before its worker goes on."""

    look: Callable[[], None]

    def begin(self, job_id: str, *, delivery: str, worker: str) -> Attempt:
        attempt = super().begin(job_id, delivery=delivery, worker=worker)
        self.look()
        self.end(attempt, AttemptEnd.CRASHED)  # there is no video to go on with
        raise JobGone


def test_an_attempt_is_leased_from_its_first_moment_on(
    tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LookedAtMeanwhile(tmp_path / "data")
    storage.prepare()
    queue = JobQueue(redis, lease_seconds=30)
    promises = Reconciliation(storage=storage, queue=queue, max_attempts=3, keep_source=False)
    storage.look = partial(reconcile, promises, redis)
    record = accepted(storage)
    monkeypatch.setattr(tasks, "workplace", workplace(promises))
    tasks.segment_video(record.id)
    assert [attempt.end for attempt in storage.attempts(record.id)] == [AttemptEnd.CRASHED]


def workplace(promises: Reconciliation) -> tasks.Workplace:
    model = ModelInfo(name="none", backbone="resnet18", weights_sha256="0" * 64, trained=False)
    ready = EngineReady(device="cpu", input_size=32, margin_frames=4, load_s=0.0, model=model)
    return tasks.Workplace(
        settings=WorkerSettings(),
        promises=promises,
        worker_name="w",
        delivery=DELIVERY,
        engine_socket=Path("engine"),
        engine_pid=1,
        engine=ready,
    )
