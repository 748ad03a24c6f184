"""Who gets in, and whose jobs they see: real API processes on one data directory. No worker runs here."""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from service.keys import KeyLimits, KeyStore
from service.storage import new_job_id
from tests.integration.conftest import Stack, eventually
from tests.videos import moving_square, write_video

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", moving_square(3, height=48, width=64))


@pytest.fixture
def store(stack: Stack) -> KeyStore:
    return KeyStore(stack.data_dir / "keys")


def client_of(stack: Stack, key: str | None, port: int = 0) -> httpx.Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{port or stack.port}", timeout=60, headers=headers)


@pytest.fixture
def clients(stack: Stack, store: KeyStore) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Two keys, two clients."""
    texts = [store.create(name, KeyLimits())[1] for name in ("one", "two")]
    stack.start_api()
    with client_of(stack, texts[0]) as one, client_of(stack, texts[1]) as two:
        yield one, two


def post(client: httpx.Client, video: Path, **headers: str) -> httpx.Response:
    return client.post("/jobs", content=video.read_bytes(), headers={"Content-Type": "video/mp4", **headers})


def test_without_a_key_only_the_signs_of_life_are_shown(
    stack: Stack, clients: tuple[httpx.Client, httpx.Client]
) -> None:
    with client_of(stack, None) as stranger:
        for path in ("/", "/jobs", "/metrics", "/version", "/docs", "/openapi.json", "/nowhere"):
            answer = stranger.get(path)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), path
            assert "Bearer" in answer.headers["WWW-Authenticate"]
        assert stranger.get("/livez").status_code == 200
        assert stranger.get("/readyz").status_code == 200
        assert stranger.get("/jobs", auth=("anyone", "imc_nothing")).status_code == 401
    assert clients[0].get("/jobs").json() == {"items": [], "next_cursor": None}


def test_a_browser_may_give_the_key_as_a_password(stack: Stack, store: KeyStore) -> None:
    _, text = store.create("browser", KeyLimits())
    stack.start_api()
    with client_of(stack, None) as browser:
        assert browser.get("/", auth=("", text)).status_code == 200


def test_a_body_without_a_key_is_not_read(stack: Stack, clients: tuple[httpx.Client, httpx.Client]) -> None:
    head = b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: video/mp4\r\nContent-Length: 2147483648\r\n\r\n"
    chunk, sent = bytes(2**20), 0
    with socket.create_connection(("127.0.0.1", stack.port), timeout=10) as connection:
        connection.sendall(head)
        try:
            for _ in range(64):
                sent += connection.send(chunk)
        except (ConnectionError, TimeoutError):
            pass
        # What the kernels on both sides hold counts as sent; nothing of it lies on the disk.
        assert sent < 16 * 2**20
    assert not list((stack.data_dir / "uploads").iterdir())


def test_a_job_is_seen_by_its_own_key_alone(
    stack: Stack, clients: tuple[httpx.Client, httpx.Client], video: Path
) -> None:
    one, two = clients
    job = post(one, video).raise_for_status().json()
    path, unknown = f"/jobs/{job['id']}", f"/jobs/{new_job_id()}"
    assert one.get(path).status_code == 200
    assert [item["id"] for item in one.get("/jobs").json()["items"]] == [job["id"]]
    assert two.get("/jobs").json()["items"] == []
    for method, end in (
        ("GET", ""),
        ("HEAD", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("GET", "/events"),
        ("GET", "/artifacts"),
        ("GET", "/artifacts/masks.zip"),
    ):
        foreign, nobodys = two.request(method, path + end), two.request(method, unknown + end)
        assert (foreign.status_code, foreign.content) == (404, nobodys.content), (method, end)
    assert one.get(path).json()["status"] == "queued"
    one.delete(path).raise_for_status()
    assert (one.get(path).status_code, two.get(path).status_code) == (410, 404)


def test_anothers_job_takes_as_long_as_none(
    stack: Stack, clients: tuple[httpx.Client, httpx.Client], video: Path
) -> None:
    one, two = clients
    job = post(one, video).raise_for_status().json()
    seconds: dict[str, list[float]] = {job["id"]: [], new_job_id(): []}
    for _ in range(60):
        for job_id, times in seconds.items():
            began = time.perf_counter()
            assert two.get(f"/jobs/{job_id}").status_code == 404
            times.append(time.perf_counter() - began)
    foreign, unknown = (statistics.median(times) for times in seconds.values())
    assert 0.7 < foreign / unknown < 1.4


@pytest.mark.parametrize("job_id", ["..%2f..%2fkeys", "%2e%2e", "a%00b", "x" * 300, "%2e%2e%2fowners", "é"])
def test_an_id_that_is_none_is_answered_as_an_unknown_one(
    clients: tuple[httpx.Client, httpx.Client], job_id: str
) -> None:
    answer = clients[0].get(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["code"]) in ((404, "job_not_found"), (404, "not_found"))


def test_keys_change_for_all_processes_within_seconds(stack: Stack, tmp_path: Path, video: Path) -> None:
    """By the command line, as an operator does it."""
    stack.start_api()
    ports = [stack.port]
    stack.start_api()
    ports.append(stack.port)

    def keys(*arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "service.cli", "keys", *arguments]
        environment = {**os.environ, **stack.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def statuses(text: str | None) -> list[int]:
        found = []
        for port in ports:
            with client_of(stack, text, port) as client:
                found.append(client.get("/jobs").status_code)
        return found

    assert statuses(None) == [200, 200]
    made = json.loads(keys("create", "pipeline", "--json"))
    eventually(lambda: statuses(None) == [401, 401] or None, within_seconds=5, what="the door closes")
    assert statuses(made["key"]) == [200, 200]
    keys("revoke", made["id"])
    eventually(
        lambda: statuses(made["key"]) == [401, 401] or None, within_seconds=5, what="the key is refused"
    )
    listed = keys("list")
    assert "revoked" in listed
    assert made["key"] not in listed


def test_a_quota_is_never_exceeded_by_parallel_uploads_to_two_processes(
    stack: Stack, store: KeyStore, video: Path
) -> None:
    _, text = store.create("one", KeyLimits(active_jobs=7))
    stack.start_api()
    ports = [stack.port]
    stack.start_api()
    ports.append(stack.port)

    def upload(number: int) -> tuple[int, str]:
        with client_of(stack, text, ports[number % 2]) as client:
            answer = post(client, video)
            return answer.status_code, answer.json().get("code", "")

    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(upload, range(20)))
    assert sorted(answers) == [(202, "")] * 7 + [(429, "quota_exceeded")] * 13
    with client_of(stack, text) as client:
        jobs = client.get("/jobs").json()["items"]
        assert len(jobs) == 7
        client.delete(f"/jobs/{jobs[0]['id']}").raise_for_status()
        assert post(client, video).status_code == 202


def test_requests_of_a_key_are_counted_over_all_processes(stack: Stack, store: KeyStore) -> None:
    _, text = store.create("one", KeyLimits(requests_per_minute=30))
    stack.start_api()
    ports = [stack.port]
    stack.start_api()
    ports.append(stack.port)
    if time.time() % 60 > 50:
        time.sleep(10.5)  # all within one window
    answers = []
    for number in range(40):
        with client_of(stack, text, ports[number % 2]) as client:
            answers.append(client.get("/jobs"))
    assert [answer.status_code for answer in answers] == [200] * 30 + [429] * 10
    assert answers[-1].json()["code"] == "rate_limited"
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 60


def test_two_keys_may_choose_the_same_idempotency_key(
    clients: tuple[httpx.Client, httpx.Client], video: Path
) -> None:
    jobs = [post(client, video, **{"Idempotency-Key": "k" * 255}).json()["id"] for client in clients]
    again = [post(client, video, **{"Idempotency-Key": "k" * 255}) for client in clients]
    assert jobs[0] != jobs[1]
    assert [answer.json()["id"] for answer in again] == jobs


def test_other_sites_pages_change_nothing(stack: Stack, video: Path) -> None:
    stack.start_api()
    with client_of(stack, None) as client:
        answer = post(client, video, **{"Sec-Fetch-Site": "cross-site"})
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_site")
        assert post(client, video, **{"Sec-Fetch-Site": "same-origin"}).status_code == 202
        assert (
            "access-control-allow-origin" not in client.get("/jobs", headers={"Origin": "http://x"}).headers
        )


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"host": "0.0.0.0"}, False),
        ({"host": "127.0.0.2"}, True),
        ({"host": "0.0.0.0", "published": "127.0.0.1:8000"}, True),
        ({"host": "127.0.0.1", "published": "0.0.0.0:8000"}, False),
    ],
)
def test_without_keys_it_listens_on_loopback_only(
    stack: Stack, store: KeyStore, settings: dict[str, str], starts: bool
) -> None:
    process = stack.start("serve", "--port", "0", **settings)
    if starts:
        eventually(
            lambda: psutil.Process(process.pid).net_connections("tcp") or None,
            within_seconds=30,
            what="it listens",
        )
        return
    assert process.wait(60) == 2
    store.create("one", KeyLimits())
    process = stack.start("serve", "--port", "0", **settings)
    eventually(
        lambda: psutil.Process(process.pid).net_connections("tcp") or None,
        within_seconds=30,
        what="it listens",
    )


def test_keys_show_up_nowhere(
    stack: Stack, store: KeyStore, video: Path, tmp_path: Path, redis: object
) -> None:
    _, text = store.create("one", KeyLimits())
    secret = text.rpartition("_")[2]
    with (tmp_path / "log").open("wb") as log:
        stack.output = log
        stack.start_api(log_level="DEBUG")
        with client_of(stack, text) as client:
            answers = [
                post(client, video),
                client.get("/jobs"),
                client.get("/version"),
                client.get("/metrics"),
            ]
    assert all(secret not in answer.text for answer in answers)
    assert secret not in (tmp_path / "log").read_text()
    for path in stack.data_dir.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()
    assert all(secret.encode() not in redis.dump(name) + name for name in redis.keys("*"))
