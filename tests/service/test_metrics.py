"""``/metrics`` as Prometheus reads it, on a real Redis and real files; and what the alerts make of it."""

import asyncio
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from service import problems, routes, tally
from service.access import Access
from service.broker import connect
from service.idempotency import IdempotencyKeys
from service.jobs import AttemptEnd, JobRecord, JobStatus, ModelInfo, Outcome, Progress, WorkerInfo, utc_now
from service.keys import KeyRing, KeyStore
from service.metrics import Metrics, RequestMetrics
from service.ownership import Ownership
from service.queue import JobQueue
from service.services import Services
from service.settings import ServiceSettings
from service.storage import JobStorage, new_job_id
from service.tally import FAMILIES, Tally
from tests.conftest import REPOSITORY
from tests.service.test_jobs import RECORD

ALERTS = [
    rule
    for group in yaml.safe_load((REPOSITORY / "docker" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
RUNBOOK = (REPOSITORY / "RUNBOOK.md").read_text()

GAUGES = {
    *("imcnet_storage_up", "imcnet_jobs_waiting", "imcnet_oldest_waiting_job_seconds", "imcnet_jobs_running"),
    *("imcnet_oldest_attempt_seconds", "imcnet_jobs_unreadable", "imcnet_disk_free_bytes"),
    *("imcnet_disk_total_bytes", "imcnet_redis_up", "imcnet_queue_length", "imcnet_leases"),
    *("imcnet_frames_per_second", "imcnet_workers", "imcnet_build_info"),
}
KNOWN_WITHOUT_REDIS = GAUGES - {
    *("imcnet_queue_length", "imcnet_leases", "imcnet_frames_per_second", "imcnet_workers")
}
COUNTERS = {f"imcnet_{family.name}_total" for family in FAMILIES}
OF_THE_PROCESS = {
    *("imcnet_http_requests_total", "imcnet_http_received_bytes_total", "imcnet_problems_total"),
    *(f"imcnet_http_request_duration_seconds_{part}" for part in ("bucket", "sum", "count")),
    *("process_open_fds", "process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"),
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def application(connection: Redis, storage: JobStorage) -> FastAPI:
    queue = JobQueue(connection)
    metrics = Metrics(storage, queue, Tally(connection))
    ring = KeyRing(KeyStore(storage.root / "keys"))
    app = FastAPI()
    app.state.services = Services(
        settings=ServiceSettings(data_dir=storage.root, disk_reserve_bytes=0),
        storage=storage,
        queue=queue,
        idempotency=IdempotencyKeys(storage.root / "idempotency"),
        keys=ring,
        owners=Ownership(storage),
        probing=asyncio.Semaphore(1),
    )
    app.state.metrics = metrics
    app.add_middleware(Access, ring=ring, max_header_bytes=16_384, take_request=lambda key: None)
    app.add_middleware(RequestMetrics, metrics=metrics)
    problems.install(app)
    app.include_router(routes.router)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError

    return app


def ask(app: FastAPI, path: str, *, method: str = "GET", **given: Any) -> httpx.Response:
    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **given)

    return asyncio.run(answer())


def scrape(app: FastAPI) -> Samples:
    answer = ask(app, "/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


@pytest.fixture
def app(redis: Redis, storage: JobStorage) -> FastAPI:
    return application(redis, storage)


@contextmanager
def hung_redis() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def accept(storage: JobStorage, *, age_seconds: float = 0) -> JobRecord:
    created_at = utc_now() - timedelta(seconds=age_seconds)
    record = RECORD.model_copy(update={"id": new_job_id(), "created_at": created_at})
    upload = storage.new_upload()
    upload.write_bytes(b"video")
    storage.accept(record, upload)
    return record


def run(storage: JobStorage, queue: JobQueue, job_id: str, *, fps: float) -> None:
    """As a worker does."""
    attempt = storage.begin(job_id, delivery=f"{job_id}-1", worker="w")
    queue.begun(job_id, attempt)
    queue.report(job_id, Progress(phase="segmenting", frames_done=1, fps=fps))


# -- what is exposed -------------------------------------------------------------------------------------


def test_every_metric_is_there_before_anything_has_happened(app: FastAPI, redis: Redis) -> None:
    announce(redis)
    scrape(app)  # an endpoint that was never asked has no figures
    samples = scrape(app)
    ours = {name for name in names(samples) if name.startswith("imcnet_")}
    assert ours == GAUGES | COUNTERS | {name for name in OF_THE_PROCESS if name.startswith("imcnet_")}
    assert names(samples) >= OF_THE_PROCESS
    assert value(samples, "imcnet_jobs_finished_total", status="failed", code="worker_crashed") == 0
    assert value(samples, "imcnet_attempts_ended_total", reason="lost") == 0


def test_it_is_plain_text_and_no_part_of_the_contract(app: FastAPI) -> None:
    answer = ask(app, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert ask(app, "/metrics", method="HEAD").status_code == 200
    assert "/metrics" not in app.openapi()["paths"]


def test_several_applications_of_one_process_count_apart(redis: Redis, storage: JobStorage) -> None:
    first, second = application(redis, storage), application(redis, storage)
    ask(first, "/livez")
    ask(first, "/livez")
    ask(second, "/livez")
    livez = {"route": "/livez", "method": "GET", "status": "200"}
    assert value(scrape(first), "imcnet_http_requests_total", **livez) == 2
    assert value(scrape(second), "imcnet_http_requests_total", **livez) == 1


# -- what this process has answered ----------------------------------------------------------------------


def test_requests_are_counted_by_the_template_of_their_route(app: FastAPI) -> None:
    for _ in range(3):
        assert ask(app, f"/jobs/{new_job_id()}").status_code == 404
    samples = scrape(app)
    labels = {"route": "/jobs/{job_id}", "method": "GET"}
    assert value(samples, "imcnet_http_requests_total", **labels, status="404") == 3
    assert value(samples, "imcnet_http_request_duration_seconds_count", **labels) == 3
    assert value(samples, "imcnet_http_request_duration_seconds_bucket", **labels, le="10.0") == 3


def test_whatever_clients_make_up_is_one_label(app: FastAPI) -> None:
    for number in range(5):
        ask(app, f"/wp-admin/{number}")
        ask(app, f"/{number}", method=f"BREW{number}")
    requests = [dict(labels) for name, labels in scrape(app) if name == "imcnet_http_requests_total"]
    assert {(labels["route"], labels["method"]) for labels in requests} == {
        ("other", "GET"),
        ("other", "other"),
    }


def test_an_unexpected_error_counts_as_500(app: FastAPI) -> None:
    assert ask(app, "/broken").status_code == 500
    labels = {"route": "/broken", "method": "GET", "status": "500"}
    assert value(scrape(app), "imcnet_http_requests_total", **labels) == 1


def test_problems_are_counted_by_their_code(app: FastAPI) -> None:
    assert value(scrape(app), "imcnet_problems_total", code="artifact_damaged") == 0
    for _ in range(2):
        assert ask(app, f"/jobs/{new_job_id()}").json()["code"] == "job_not_found"
    assert ask(app, "/jobs?limit=0").json()["code"] == "invalid_options"
    samples = scrape(app)
    assert value(samples, "imcnet_problems_total", code="job_not_found") == 2
    assert value(samples, "imcnet_problems_total", code="invalid_options") == 1


def test_uploaded_bytes_are_counted(app: FastAPI) -> None:
    body = b"no video" * 1000
    answer = ask(app, "/jobs", method="POST", content=body, headers={"Content-Type": "video/mp4"})
    assert answer.json()["code"] == "not_a_video"
    assert value(scrape(app), "imcnet_http_received_bytes_total") == len(body)


# -- where things stand ----------------------------------------------------------------------------------


def announce(redis: Redis, device: str = "cuda:0", name: str = "w") -> None:
    model = ModelInfo(name="m", backbone="resnet18", weights_sha256="0" * 64, trained=True)
    redis.sadd("rq:workers:imcnet", f"rq:worker:{name}")  # RQ's own registration
    JobQueue(redis).announce(
        WorkerInfo(name=name, host="h", device=device, engine_pid=1, load_s=0.1, model=model)
    )


def test_waiting_and_running_jobs_are_told_apart(app: FastAPI, redis: Redis, storage: JobStorage) -> None:
    queue = JobQueue(redis)
    for age_seconds in (10, 600, 0):
        queue.deliver(accept(storage, age_seconds=age_seconds).id)
    for fps in (2.5, 1.25):
        run(storage, queue, accept(storage, age_seconds=5000).id, fps=fps)
    samples = scrape(app)
    assert value(samples, "imcnet_jobs_waiting") == value(samples, "imcnet_queue_length") == 3
    assert 600 <= value(samples, "imcnet_oldest_waiting_job_seconds") < 700
    assert value(samples, "imcnet_jobs_running") == value(samples, "imcnet_leases") == 2
    assert 0 <= value(samples, "imcnet_oldest_attempt_seconds") < 100
    assert value(samples, "imcnet_frames_per_second") == 3.75


def test_jobs_that_ended_neither_wait_nor_run(app: FastAPI, storage: JobStorage) -> None:
    outcome = Outcome(status=JobStatus.CANCELED, finished_at=utc_now())
    assert storage.conclude(accept(storage, age_seconds=600).id, outcome)
    samples = scrape(app)
    assert value(samples, "imcnet_jobs_waiting") == value(samples, "imcnet_jobs_running") == 0
    assert value(samples, "imcnet_oldest_waiting_job_seconds") == 0


def test_a_job_whose_attempt_was_lost_waits_again(app: FastAPI, redis: Redis, storage: JobStorage) -> None:
    job_id = accept(storage, age_seconds=5000).id
    run(storage, JobQueue(redis), job_id, fps=1)
    assert storage.end(storage.attempts(job_id)[-1], AttemptEnd.LOST)
    samples = scrape(app)
    assert (value(samples, "imcnet_jobs_waiting"), value(samples, "imcnet_jobs_running")) == (1, 0)
    assert value(samples, "imcnet_oldest_waiting_job_seconds") < 100


def test_a_lease_that_ran_out_and_a_job_that_the_queue_lost_are_seen(
    app: FastAPI, redis: Redis, storage: JobStorage
) -> None:
    queue = JobQueue(redis)
    queue.deliver(accept(storage).id)
    run(storage, queue, accept(storage).id, fps=1)
    redis.flushall()
    samples = scrape(app)
    assert value(samples, "imcnet_jobs_waiting") - value(samples, "imcnet_queue_length") == 1
    assert value(samples, "imcnet_jobs_running") - value(samples, "imcnet_leases") == 1


def test_workers_are_counted_by_device(app: FastAPI, redis: Redis) -> None:
    for name, device in (("a", "cuda:0"), ("b", "cuda:0"), ("c", "cpu")):
        announce(redis, device, name)
    samples = scrape(app)
    assert value(samples, "imcnet_workers", device="cuda:0") == 2
    assert value(samples, "imcnet_workers", device="cpu") == 1


def test_what_all_processes_count_is_shown(app: FastAPI, redis: Redis) -> None:
    counts = Tally(redis)
    counts.add({tally.FRAMES_SEGMENTED: 512, tally.attempt_ended(AttemptEnd.LOST): 2})
    counts.add({"of_a_newer_release": 1, "attempts_ended:for_a_new_reason": 1, "attempts_ended:a:b": 1})
    samples = scrape(app)
    assert value(samples, "imcnet_frames_segmented_total") == 512
    assert value(samples, "imcnet_attempts_ended_total", reason="lost") == 2
    assert value(samples, "imcnet_attempts_ended_total", reason="for_a_new_reason") == 1
    assert not [name for name in names(samples) if "newer" in name]


def test_a_job_whose_files_make_no_sense_is_told_and_stops_nothing(app: FastAPI, storage: JobStorage) -> None:
    accept(storage)
    broken = accept(storage)
    storage.source(broken.id).with_name("job.json").write_text("{")
    samples = scrape(app)
    assert (value(samples, "imcnet_jobs_unreadable"), value(samples, "imcnet_jobs_waiting")) == (1, 1)


# -- when things are down --------------------------------------------------------------------------------


def test_without_redis_the_rest_is_told_within_two_seconds(storage: JobStorage) -> None:
    accept(storage)
    with hung_redis() as hung:
        for url in ("redis://127.0.0.1:1/0", hung):
            app = application(connect(url, timeout_seconds=1), storage)
            began = time.monotonic()
            samples = scrape(app)
            assert time.monotonic() - began < 2
            assert value(samples, "imcnet_redis_up") == 0
            assert value(samples, "imcnet_jobs_waiting") == 1
            assert {name for name in names(samples) if name.startswith("imcnet_")} >= KNOWN_WITHOUT_REDIS
            assert not names(samples) & {"imcnet_workers", "imcnet_leases", *COUNTERS}


def test_without_the_storage_the_rest_is_told(redis: Redis, tmp_path: Path) -> None:
    samples = scrape(application(redis, JobStorage(tmp_path / "not-there")))
    assert (value(samples, "imcnet_storage_up"), value(samples, "imcnet_redis_up")) == (0, 1)
    assert "imcnet_jobs_waiting" not in names(samples)


# -- alerts and runbook ----------------------------------------------------------------------------------


def test_alerts_speak_of_metrics_and_labels_that_exist(app: FastAPI, redis: Redis) -> None:
    announce(redis)
    ask(app, "/readyz")
    ask(app, "/broken")
    samples = scrape(app)
    assert ALERTS
    for alert in ALERTS:
        used = set(re.findall(r"\b(?:imcnet|process)_\w+", alert["expr"]))
        assert used <= names(samples), alert["alert"]
        for name, selector in re.findall(r"\b(\w+)\{([^}]*)\}", alert["expr"]):
            wanted = dict(re.findall(r'(\w+)=~?"([^"]*)"', selector))
            found = [dict(labels) for other, labels in samples if other == name]
            assert name == "up" or any(matches(labels, wanted) for labels in found), alert["alert"]


def matches(labels: dict[str, str], wanted: dict[str, str]) -> bool:
    return all(re.fullmatch(pattern, labels.get(name, "")) for name, pattern in wanted.items())


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
def test_every_alert_has_its_section_in_the_runbook(alert: dict[str, Any]) -> None:
    assert f"\n### {alert['alert']}\n" in RUNBOOK
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["runbook"] == f"RUNBOOK.md#{alert['alert'].lower()}"
    assert alert["annotations"]["summary"]


def test_the_runbook_speaks_of_no_alert_or_metric_that_does_not_exist(app: FastAPI, redis: Redis) -> None:
    announce(redis)
    scrape(app)
    known = names(scrape(app))
    spoken_of = re.sub(r"docker volume rm [^`\n]+", "", RUNBOOK)
    assert set(re.findall(r"\bimcnet_[a-z_]+\b", spoken_of)) <= known
    alerts_part = RUNBOOK.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^### (\w+)$", alerts_part, re.MULTILINE)) == {a["alert"] for a in ALERTS}
