"""Who gets in, and whose jobs they see: real API processes on one data directory. No worker runs here."""

import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
    chunk, sent = bytes(2**16), 0
    with socket.create_connection(("127.0.0.1", stack.port), timeout=10) as connection:
        connection.sendall(head)
        with suppress(ConnectionError, TimeoutError):
            while sent < 64 * 2**20:
                sent += connection.send(chunk)
        # What the kernels on both sides hold counts as sent.
        assert sent < 4 * 2**20
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


def test_the_door_stays_closed_when_the_keys_are_gone(
    stack: Stack, clients: tuple[httpx.Client, httpx.Client], tmp_path: Path
) -> None:
    (stack.data_dir / "keys").rename(tmp_path / "elsewhere")
    with client_of(stack, None) as stranger:
        for _ in range(4):
            assert stranger.get("/jobs").status_code == 401
            time.sleep(0.5)
    (stack.data_dir / "keys").touch()  # no folder, so nobody knows what is in it
    time.sleep(1.1)
    answer = clients[0].get("/jobs")
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")


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


@contextmanager
def begun_upload(port: int, text: str, head: bytes, body: bytes) -> Iterator[socket.socket]:
    """A connection on which the beginning of a video has been posted."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(
            b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: video/mp4\r\nAuthorization: Bearer "
            + text.encode()
            + b"\r\n"
            + head
            + b"\r\n\r\n"
            + body
        )
        yield connection


def status_of(connection: socket.socket) -> int:
    return int(connection.makefile("rb").readline().split()[1])


def test_a_revoked_key_ends_what_is_under_way(stack: Stack, store: KeyStore, video: Path) -> None:
    key, text = store.create("one", KeyLimits())
    stack.start_api()
    data = video.read_bytes()
    with client_of(stack, text) as client:
        job = post(client, video).raise_for_status().json()
        waited: list[httpx.Response] = []
        waiting = threading.Thread(
            target=lambda: waited.append(client.get(f"/jobs/{job['id']}", params={"wait": 30}))
        )
        length = b"Content-Length: %d" % len(data)
        with (
            begun_upload(stack.port, text, length, data[:-1]) as connection,
            client_of(stack, text) as watcher,
            watcher.stream("GET", f"/jobs/{job['id']}/events") as events,
        ):
            waiting.start()
            time.sleep(0.5)
            store.revoke(key.id)
            began = time.monotonic()
            assert b"event: status" in b"".join(events.iter_bytes())
            waiting.join()
            assert waited[0].status_code == 401
            assert time.monotonic() - began < 5
            connection.sendall(data[-1:])
            assert status_of(connection) == 401
    assert [path.name for path in (stack.data_dir / "jobs").iterdir()] == [job["id"]]


def test_uploads_under_way_count_towards_the_quota_in_all_processes(
    stack: Stack, store: KeyStore, video: Path
) -> None:
    data = video.read_bytes()
    _, text = store.create("one", KeyLimits(queued_bytes=3 * len(data) - 1))
    stack.start_api()
    ports = [stack.port]
    stack.start_api()
    ports.append(stack.port)
    length = b"Content-Length: %d" % len(data)
    with (
        client_of(stack, text) as client,
        begun_upload(ports[0], text, length, data[:-1]) as first,
        begun_upload(ports[1], text, length, data[:-1]) as second,
    ):
        eventually(
            lambda: len(list((stack.data_dir / "uploads").iterdir())) == 2 or None,
            within_seconds=10,
            what="both uploads are under way",
        )
        answer = post(client, video)
        assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
        first.sendall(data[-1:])
        assert status_of(first) == 202
        assert post(client, video).status_code == 429
        second.shutdown(socket.SHUT_RDWR)
        eventually(
            lambda: post(client, video).status_code == 202 or None,
            within_seconds=10,
            what="what the lost upload took is free",
        )
        assert post(client, video).status_code == 429


def test_an_upload_of_unknown_length_ends_where_the_quota_does(stack: Stack, store: KeyStore) -> None:
    _, text = store.create("one", KeyLimits(stored_bytes=300_000))
    stack.start_api()
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    with begun_upload(stack.port, text, b"Transfer-Encoding: chunked", 3 * chunk) as one:
        eventually(
            lambda: len(list((stack.data_dir / "uploads").iterdir())) == 1 or None,
            within_seconds=10,
            what="the upload is under way",
        )
        with begun_upload(stack.port, text, b"Content-Length: 1", b"") as another:
            assert status_of(another) == 429
        one.sendall(2 * chunk)
        assert status_of(one) == 413


def test_an_upload_that_no_quota_allows_is_too_large(stack: Stack, store: KeyStore) -> None:
    _, text = store.create("one", KeyLimits(stored_bytes=1))
    stack.start_api()
    with begun_upload(stack.port, text, b"Content-Length: " + b"9" * 20, b"") as connection:
        assert status_of(connection) == 413


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
        # To plain HTTP, browsers tell nothing but this.
        assert post(client, video, Origin="http://evil.example").json()["code"] == "cross_site"
        assert post(client, video, Origin="null").json()["code"] == "cross_site"
        assert post(client, video, Origin=f"http://127.0.0.1:{stack.port}").status_code == 202
        assert (
            "access-control-allow-origin" not in client.get("/jobs", headers={"Origin": "http://x"}).headers
        )


def test_without_keys_only_this_machines_names_are_answered(
    stack: Stack, store: KeyStore, video: Path
) -> None:
    """A site whose name is made to point here is, to a browser, where its pages came from."""
    stack.start_api()
    with client_of(stack, None) as client:
        evil = {"Host": f"evil.example:{stack.port}", "Sec-Fetch-Site": "same-origin"}
        for answer in (client.get("/jobs", headers=evil), post(client, video, **evil)):
            assert (answer.status_code, answer.json()["code"]) == (421, "foreign_host")
        for host in ("localhost", f"LOCALHOST:{stack.port}", "127.0.0.1", f"[::1]:{stack.port}"):
            assert client.get("/jobs", headers={"Host": host}).status_code == 200
    _, text = store.create("one", KeyLimits())
    with client_of(stack, text) as client:
        eventually(
            lambda: client.get("/jobs", headers={"Host": "any.example"}).status_code == 200 or None,
            within_seconds=5,
            what="the key is what counts",
        )


def test_signs_of_life_are_shown_below_a_root_path(stack: Stack, store: KeyStore) -> None:
    store.create("one", KeyLimits())
    stack.start_api(root_path="/imcnet")
    with client_of(stack, None) as stranger:
        for path in ("/livez", "/readyz"):
            assert stranger.get(path).status_code == 200
        assert stranger.get("/jobs").status_code == 401


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
