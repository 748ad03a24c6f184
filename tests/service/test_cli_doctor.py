"""`imcnet doctor`, on a real Redis and real files: what is wrong is found, and nothing else."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

from service.cli import app
from service.cli.doctor import CHECKS
from service.cli.examination import Finding, Patient, examine
from service.jobs import Attempt, JobRecord, ModelInfo, WorkerInfo, utc_now
from service.queue import JobQueue
from service.storage import JobStorage, new_job_id
from tests.service.test_jobs import RECORD
from tests.service.test_queue import taken
from tests.service.test_storage import accepted, canceled, made

NAMES = {check.name for check in CHECKS}
OF_REDIS = {
    *("redis version", "redis persistence", "redis memory", "redis clock", "identity", "queue length"),
    *("stuck jobs", "leases", "keys", "workers"),
}
MODEL = ModelInfo(name="imcnet", backbone="resnet18", weights_sha256="0" * 64, trained=True)


@pytest.fixture
def queue(redis: Redis, storage: JobStorage) -> JobQueue:
    queue = JobQueue(redis, lease_seconds=60)
    queue.serve(storage.identity)
    return queue


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, storage: JobStorage, queue: JobQueue, redis_url: str) -> None:
    monkeypatch.delenv("IMCNET_TEST_DATA", raising=False)  # is none of the service's settings
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("IMCNET_DATA_DIR", str(storage.root))
    monkeypatch.setenv("IMCNET_REDIS_URL", redis_url)
    monkeypatch.setenv("IMCNET_DISK_RESERVE_BYTES", "0")


def look(name: str) -> Finding:
    """What one check finds, whatever the others would."""
    (check,) = (check for check in CHECKS if check.name == name)
    ((_, finding),) = examine(Patient(), [replace(check, needs=())])
    assert bool(finding.advice) == (finding.level in ("warn", "FAIL"))
    return finding


def waiting(storage: JobStorage, queue: JobQueue) -> JobRecord:
    record = accepted(storage)
    queue.deliver(record.id)
    return record


def running(storage: JobStorage, queue: JobQueue, redis: Redis) -> tuple[JobRecord, Attempt]:
    """A job that a worker is at; call it before others wait."""
    record = waiting(storage, queue)
    attempt = storage.begin(record.id, delivery=taken(redis), worker="w")
    queue.begun(record.id, attempt)
    redis.delete("rq:queue:imcnet:intermediate")  # as RQ does when the horse begins
    return record, attempt


def start_worker(queue: JobQueue, redis: Redis, name: str, *, model: ModelInfo = MODEL) -> None:
    redis.sadd("rq:workers:imcnet", f"rq:worker:{name}")  # RQ's own registration
    queue.announce(WorkerInfo(name=name, host="h", device="cpu", engine_pid=1, load_s=0.1, model=model))


@contextmanager
def api(status: int) -> Iterator[int]:
    """Answers everything so; the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"ready": true}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextmanager
def configured(redis: Redis, **options: object) -> Iterator[None]:
    """Redis with other options for a while."""
    names = [name.replace("_", "-") for name in options]
    before = {name: redis.config_get(name)[name] for name in names}
    for name, value in zip(names, options.values(), strict=True):
        redis.config_set(name, str(value))
    try:
        yield
    finally:
        for name, value in before.items():
            redis.config_set(name, value)


# -- the whole -------------------------------------------------------------------------------------------


def test_of_a_healthy_system_all_is_well(
    monkeypatch: pytest.MonkeyPatch, storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    running(storage, queue, redis)
    waiting(storage, queue)
    storage.conclude(accepted(storage).id, canceled())
    start_worker(queue, redis, "w")
    monkeypatch.setenv("IMCNET_DEVICE", "cpu")
    with api(200) as port:
        monkeypatch.setenv("IMCNET_PORT", str(port))
        result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert {finding["check"] for finding in report["findings"]} == NAMES
    assert [finding for finding in report["findings"] if finding["level"] != "ok"] == []
    assert report["well"] is True
    assert result.exit_code == 0


def test_without_redis_it_says_so_once_and_looks_at_the_rest_without_torch(
    tmp_path: Path, storage: JobStorage
) -> None:
    program = (
        "import sys; from service.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    given = {
        "IMCNET_REDIS_URL": "redis://:secret@127.0.0.1:1/0",
        "IMCNET_DATA_DIR": str(storage.root),
        "IMCNET_WEIGHTS": str(tmp_path / "none"),
    }
    result = subprocess.run(
        [sys.executable, "-c", program, "doctor"],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 1
    assert result.stderr == ""
    assert "secret" not in result.stdout
    levels = {
        line[6:].partition(":")[0]: line[:5].strip()
        for line in result.stdout.splitlines()
        if not line.startswith("      → ")
    }
    assert levels.keys() == NAMES
    assert {name for name, level in levels.items() if level == "FAIL"} == {"redis", "weights"}
    assert {name for name, level in levels.items() if level == "skip"} == OF_REDIS
    lines = result.stdout.splitlines()
    (at,) = (place for place, line in enumerate(lines) if line.startswith("FAIL  redis: "))
    assert "127.0.0.1:1" in lines[at]
    assert "IMCNET_REDIS_URL" in lines[at + 1]


def test_it_changes_nothing(storage: JobStorage, queue: JobQueue, redis: Redis) -> None:
    running(storage, queue, redis)
    accepted(storage)  # stuck
    queue.deliver(new_job_id())  # a stray

    def everything() -> tuple[list[str], list[bytes]]:
        return sorted(map(str, storage.root.rglob("*"))), sorted(redis.scan_iter())

    before = everything()
    for check in CHECKS:
        if check.name not in ("weights", "device"):
            look(check.name)
    assert everything() == before


def test_a_check_that_raises_has_failed_and_the_next_is_made(storage: JobStorage) -> None:
    storage.uploads.rmdir()
    storage.uploads.write_text("no directory")
    findings = {check.name: finding for check, finding in examine(Patient(), CHECKS[:4])}
    assert findings["writing"].level == "FAIL"
    assert findings["writing"].message.startswith("NotADirectoryError: ")
    assert findings["file system"].level == "ok"


# -- settings --------------------------------------------------------------------------------------------


def test_a_setting_that_is_not_valid_is_named_and_what_needs_it_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMCNET_PORT", "http")
    findings = {check.name: finding for check, finding in examine(Patient(), CHECKS)}
    assert findings["settings"].level == "FAIL"
    assert "IMCNET_PORT" in findings["settings"].message
    assert {name for name, finding in findings.items() if finding.level == "skip"} == NAMES - {
        "settings",
        "media",
    }


def test_settings_are_told_by_name_and_a_slip_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMCNET_REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    assert look("settings").level == "ok"
    assert "IMCNET_REDIS_URL" in look("settings").message
    assert "secret" not in look("settings").message
    monkeypatch.setenv("IMCNET_RETENTION", "1")
    assert look("settings").level == "warn"
    assert look("settings").message.endswith(": IMCNET_RETENTION")


# -- data directory --------------------------------------------------------------------------------------


def test_a_data_directory_that_is_not_there_is_not_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IMCNET_DATA_DIR", str(tmp_path / "none"))
    assert look("data directory").level == "FAIL"
    assert not (tmp_path / "none").exists()


def test_a_file_in_place_of_the_data_directory_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IMCNET_DATA_DIR", str(tmp_path / "file"))
    findings = {check.name: finding.level for check, finding in examine(Patient(), CHECKS[:-4])}
    assert findings["data directory"] == "FAIL"
    assert {findings[name] for name in ("writing", "disk space", "records", "stuck jobs")} == {"skip"}
    assert findings["redis"] == "ok"


def test_a_directory_that_is_none_of_ours_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMCNET_DATA_DIR", str(tmp_path))
    assert look("data directory").level == "FAIL"
    assert "jobs" in look("data directory").message


def test_parts_on_another_file_system_are_found(storage: JobStorage) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == storage.root.stat().st_dev:
        pytest.skip("there is but one file system")
    shutil.rmtree(storage.root / "trash")
    (storage.root / "trash").symlink_to(elsewhere)
    assert look("data directory").level == "FAIL"
    assert "several file systems" in look("data directory").message


def test_the_reserve_of_the_disk_is_compared_with_what_is_free(
    monkeypatch: pytest.MonkeyPatch, storage: JobStorage
) -> None:
    for share, level in ((0.1, "ok"), (0.75, "warn"), (1.5, "FAIL")):
        monkeypatch.setenv("IMCNET_DISK_RESERVE_BYTES", str(int(share * storage.free_bytes())))
        assert look("disk space").level == level


def test_what_the_sweep_should_have_removed_is_counted(storage: JobStorage) -> None:
    ended, expired = accepted(storage), accepted(storage)
    storage.conclude(ended.id, canceled())
    storage.conclude(expired.id, canceled().model_copy(update={"finished_at": utc_now() - timedelta(days=9)}))
    leftovers = [
        storage.uploads / "a.part",
        storage.root / "trash" / "b",
        storage.root / "trash" / "c",
        storage.source(ended.id).parent / "attempt-0001",
    ]
    for path in leftovers:
        path.mkdir()
    assert look("left-overs").message == "Left over for more than an hour: 1 expired jobs"
    for path in (*leftovers, storage.source(ended.id).parent / "outcome.json"):
        os.utime(path, (time.time() - 4000,) * 2)
    assert look("left-overs").level == "warn"
    assert look("left-overs").message.endswith(
        "1 in uploads/, 2 in trash/, 1 of jobs that have ended, 1 expired jobs"
    )


def test_what_is_under_way_is_no_left_over(storage: JobStorage, queue: JobQueue, redis: Redis) -> None:
    _, attempt = running(storage, queue, redis)
    (storage.spans(attempt, "key") / "000000").mkdir(parents=True)
    storage.new_upload().write_bytes(b"begin of a video")
    assert look("left-overs").level == "ok"


@pytest.mark.parametrize("file", ["job.json", "outcome.json"])
def test_damaged_files_of_a_job_are_found(storage: JobStorage, file: str) -> None:
    sound, damaged = accepted(storage), accepted(storage)
    attempt = storage.begin(sound.id, delivery="d", worker="w")
    storage.publish(attempt, made(attempt))
    assert look("records").level == "ok"
    (storage.source(damaged.id).parent / file).write_text('{"version": 1')
    assert look("records").level == "FAIL"
    assert look("records").message == f"The files of 1 of 2 jobs are damaged: {damaged.id}"


def test_a_job_without_its_record_is_found(storage: JobStorage) -> None:
    record = accepted(storage)
    (storage.source(record.id).parent / "job.json").unlink()
    assert record.id in look("records").message


# -- Redis -----------------------------------------------------------------------------------------------


def test_a_redis_that_may_throw_keys_away_is_found(redis: Redis) -> None:
    assert look("redis memory").level == "ok"
    with configured(redis, maxmemory=2**30, maxmemory_policy="allkeys-lru"):
        assert look("redis memory").level == "FAIL"
        assert "noeviction" in look("redis memory").advice
    with configured(redis, maxmemory=2**30):
        assert look("redis memory").level == "ok"
    with configured(redis, maxmemory_policy="allkeys-lru"):  # without a limit nothing is thrown away
        assert look("redis memory").level == "ok"


def test_a_redis_that_is_almost_full_is_found(redis: Redis) -> None:
    with configured(redis, maxmemory=int(1.15 * redis.info()["used_memory"])):
        assert look("redis memory").level == "warn"


def test_a_redis_without_an_append_only_file_is_found(redis: Redis) -> None:
    assert look("redis persistence").level == "ok"
    with configured(redis, appendonly="no"):
        assert look("redis persistence").level == "warn"


def test_a_redis_of_another_data_directory_is_found(queue: JobQueue, redis: Redis) -> None:
    queue.serve("another")
    findings = {check.name: finding.level for check, finding in examine(Patient(), CHECKS[:-4])}
    assert findings["identity"] == "FAIL"
    assert {findings[name] for name in ("stuck jobs", "leases", "keys")} == {"skip"}
    redis.delete("imcnet:storage")
    assert look("identity").level == "warn"


# -- the queue -------------------------------------------------------------------------------------------


def test_a_queue_that_is_almost_full_is_found(
    monkeypatch: pytest.MonkeyPatch, storage: JobStorage, queue: JobQueue
) -> None:
    monkeypatch.setenv("IMCNET_MAX_QUEUED_JOBS", "5")
    for level in ("ok", "ok", "ok", "warn"):
        waiting(storage, queue)
        assert look("queue length").level == level


def test_a_job_that_waits_for_long_is_found(storage: JobStorage) -> None:
    assert look("waiting").message == "Nobody waits"
    for age_seconds, level in ((60, "ok"), (4000, "warn")):
        upload = storage.new_upload()
        upload.write_bytes(b"video")
        created_at = utc_now() - timedelta(seconds=age_seconds)
        record = RECORD.model_copy(update={"id": new_job_id(), "created_at": created_at})
        storage.accept(record, upload)
        assert look("waiting").level == level
    assert "1h 6m" in look("waiting").message


def test_a_job_that_nobody_would_come_to_is_told_apart_from_those_that_wait_or_run(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    running(storage, queue, redis)
    waiting(storage, queue)
    storage.conclude(accepted(storage).id, canceled())
    assert look("stuck jobs").level == "ok"
    stuck = accepted(storage)
    finding = look("stuck jobs")
    assert finding.level == "FAIL"
    assert finding.message == f"1 jobs wait, but not in the queue: {stuck.id}"


def test_a_job_on_its_way_to_a_worker_is_not_stuck(
    storage: JobStorage, queue: JobQueue, redis: Redis
) -> None:
    record = waiting(storage, queue)
    delivery = taken(redis)

    def begin() -> None:
        queue.begun(record.id, storage.begin(record.id, delivery=delivery, worker="w"))

    worker = threading.Timer(1, begin)
    worker.start()
    assert look("stuck jobs").level == "ok"
    worker.join()


def test_a_running_job_without_a_lease_is_found(storage: JobStorage, queue: JobQueue, redis: Redis) -> None:
    silent, attempt = running(storage, queue, redis)
    running(storage, queue, redis)
    assert look("leases").level == "ok"
    redis.delete(f"imcnet:lease:{attempt.record.delivery}")
    finding = look("leases")
    assert finding.level == "warn"
    assert finding.message == f"1 of 2 running jobs have no lease: {silent.id}"


def test_keys_of_a_job_that_does_not_exist_are_found(storage: JobStorage, queue: JobQueue) -> None:
    waiting(storage, queue)
    assert look("keys").level == "ok"
    queue.deliver(stray := new_job_id())
    assert look("keys").level == "warn"
    assert look("keys").message == f"Redis has keys of 1 jobs that do not exist: {stray}"


def test_workers_are_counted_and_compared(queue: JobQueue, redis: Redis) -> None:
    assert look("workers").level == "FAIL"
    start_worker(queue, redis, "a")
    start_worker(queue, redis, "b")
    assert look("workers") == Finding("ok", "2 alive: imcnet on cpu")
    start_worker(queue, redis, "c", model=MODEL.model_copy(update={"weights_sha256": "1" * 64}))
    assert "different weights" in look("workers").advice


def test_untrained_weights_of_workers_are_found(queue: JobQueue, redis: Redis) -> None:
    start_worker(queue, redis, "a", model=MODEL.model_copy(update={"trained": False}))
    assert look("workers").level == "warn"
    assert "untrained" in look("workers").advice


# -- this machine ----------------------------------------------------------------------------------------


def test_weights_are_held_to_their_hash(monkeypatch: pytest.MonkeyPatch, untrained_weights: Path) -> None:
    monkeypatch.setenv("IMCNET_WEIGHTS", str(untrained_weights))
    assert look("weights").level == "ok"
    monkeypatch.setenv("IMCNET_WEIGHTS_SHA256", "0" * 64)
    finding = look("weights")
    assert finding.level == "FAIL"
    assert "IMCNET_WEIGHTS_SHA256" in finding.advice


def test_a_file_that_is_no_weights_file_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    monkeypatch.setenv("IMCNET_WEIGHTS", str(tmp_path / "text"))
    finding = look("weights")
    assert finding.level == "FAIL"
    assert "safetensors" in finding.message


def test_a_device_that_is_not_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("device").level == "warn"  # auto, and there is but the CPU
    monkeypatch.setenv("IMCNET_DEVICE", "cuda:7")
    finding = look("device")
    assert finding.level == "FAIL"
    assert "cuda:7" in finding.message


def test_without_torch_weights_and_device_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert {look("weights").level, look("device").level} == {"skip"}


def test_an_api_that_is_not_ready_or_hangs_or_is_elsewhere_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with api(503) as port:
        monkeypatch.setenv("IMCNET_PORT", str(port))
        finding = look("API")
    assert finding.level == "FAIL"
    assert "503" in finding.message
    assert look("API").level == "warn"  # nobody listens there any more
    with socket.create_server(("127.0.0.1", port)):
        finding = look("API")
    assert finding.level == "FAIL"
    assert "hangs" in finding.message
