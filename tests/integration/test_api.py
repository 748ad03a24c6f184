"""The HTTP contract, against a real API on a real Redis. No worker runs here, so jobs stay queued."""

import hashlib
import os
import random
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from redis import Redis

from service.jobs import Artifact, JobStatus, Outcome, utc_now
from service.storage import JobStorage, new_job_id
from tests.integration.conftest import Stack
from tests.videos import moving_square, write_video
from tests.waiting import wait_until

pytestmark = pytest.mark.processes

UNKNOWN = new_job_id()
BODY = b"not really a zip, but bytes all the same" * 1000
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing sends RST


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    stack.start_api(max_upload_bytes=1_000_000)
    with stack.client as client:
        yield client


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", moving_square(5, height=48, width=64))


def post(client: httpx.Client, video: Path, **fields: object) -> httpx.Response:
    with open(video, "rb") as file:
        return client.post("/jobs", files={"video": (video.name, file)}, data=fields)


def assert_problem(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    problem = answer.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["title"]
    assert not re.search(r"Traceback|/tmp|\.py|source", problem["detail"])


def succeed(stack: Stack, job_id: str, body: bytes = BODY) -> Artifact:
    """What a worker would do: make an artifact and publish it."""
    storage = JobStorage(stack.data_dir)
    artifact = Artifact(
        name="masks.zip",
        media_type="application/zip",
        bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
    )
    attempt = storage.begin(job_id, delivery="delivery", worker="worker")
    (attempt.directory / "artifacts").mkdir()
    (attempt.directory / "artifacts" / "masks.zip").write_bytes(body)
    outcome = Outcome(
        status=JobStatus.SUCCEEDED, finished_at=utc_now(), attempt=1, artifacts=(artifact,), frames=5
    )
    assert storage.publish(attempt, outcome)
    return artifact


def files_of_jobs(stack: Stack) -> list[str]:
    """The names of all files but the one that is there from the beginning."""
    return [path.name for path in stack.data_dir.rglob("*") if path.is_file() and path.name != "identity"]


# -- creating --------------------------------------------------------------------------------------------


def test_a_video_posted_as_a_form_is_accepted(client: httpx.Client, video: Path) -> None:
    answer = post(client, video, threshold="0.25", max_side="32", quality="multi_scale")
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == job["links"]["self"] == f"/jobs/{job['id']}"
    assert answer.headers["retry-after"]
    assert (job["status"], job["queue_position"], job["attempt"]) == ("queued", 1, 0)
    assert job["options"] == {
        "threshold": 0.25,
        "max_side": 32,
        "quality": "multi_scale",
        "artifacts": ["masks"],
    }
    assert job["input"]["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
    assert (job["input"]["filename"], job["input"]["bytes"]) == ("clip.mp4", video.stat().st_size)
    assert (job["input"]["width"], job["input"]["height"], job["input"]["fps"]) == (64, 48, 25.0)
    assert [warning["code"] for warning in job["warnings"]] == ["no_worker"]
    assert client.get(f"/jobs/{job['id']}").json() == job


@pytest.mark.parametrize("content_type", ["video/mp4", "application/octet-stream", "video/x-matroska"])
def test_a_bare_video_is_accepted_with_options_in_the_query(
    client: httpx.Client, video: Path, content_type: str
) -> None:
    answer = client.post(
        "/jobs?threshold=0.75&artifacts=masks&artifacts=overlay",
        content=video.read_bytes(),
        headers={"content-type": content_type},
    )
    assert answer.status_code == 202
    assert answer.json()["options"] == {
        "threshold": 0.75,
        "max_side": None,
        "quality": "exact",
        "artifacts": ["masks", "overlay"],
    }
    assert answer.json()["input"]["filename"] is None


def test_a_bare_video_may_be_streamed_without_a_length(client: httpx.Client, video: Path) -> None:
    data = video.read_bytes()
    chunks = (data[i : i + 1000] for i in range(0, len(data), 1000))
    answer = client.post("/jobs", content=chunks, headers={"content-type": "video/mp4"})
    assert answer.status_code == 202
    assert answer.json()["input"]["bytes"] == len(data)


@pytest.mark.parametrize(
    ("fields", "query"),
    [
        ({"threshold": "2"}, ""),
        ({"threshold": "high"}, ""),
        ({"colour": "red"}, ""),
        ({"quality": "best"}, ""),
        ({"artifacts": "pictures"}, ""),
        ({"threshold": ["0.1", "0.2"]}, ""),
        ({"threshold": "0.1"}, "?threshold=0.1"),
        ({}, "?max_side=1"),
        ({}, "?colour=red"),
    ],
)
def test_wrong_options_are_refused(
    client: httpx.Client, video: Path, fields: dict[str, object], query: str
) -> None:
    with open(video, "rb") as file:
        answer = client.post(f"/jobs{query}", files={"video": file}, data=fields)
    assert_problem(answer, 422, "invalid_options")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "empty_file"),
        (b"x", 422, "not_a_video"),
        (b"\0" * 5000, 422, "not_a_video"),
        (b"<html>no video</html>", 422, "not_a_video"),
        (b"v" * 1_000_001, 413, "upload_too_large"),
    ],
)
def test_what_is_no_video_is_refused_and_leaves_nothing(
    stack: Stack, client: httpx.Client, body: bytes, status: int, code: str
) -> None:
    assert_problem(client.post("/jobs", content=body, headers={"content-type": "video/mp4"}), status, code)
    assert_problem(client.post("/jobs", files={"video": ("v.mp4", body)}), status, code)
    assert files_of_jobs(stack) == []


def test_requests_without_a_video_are_refused(client: httpx.Client, video: Path) -> None:
    assert_problem(client.post("/jobs", files={"film": b"x"}), 422, "missing_video")
    assert_problem(client.post("/jobs", json={"video": "x"}), 415, "unsupported_media_type")
    assert_problem(client.post("/jobs"), 415, "unsupported_media_type")


def test_a_full_queue_and_a_full_disk_are_refused(stack: Stack, video: Path) -> None:
    stack.start_api(max_queued_jobs=1)
    stack.post(video)
    with stack.client as client:
        answer = post(client, video)
        assert_problem(answer, 503, "queue_full")
        assert int(answer.headers["retry-after"]) > 0
    stack.start_api(disk_reserve_bytes=2**60)
    with stack.client as client:
        assert_problem(post(client, video), 507, "storage_full")


def test_a_disk_that_cannot_be_used_is_refused_until_it_can(stack: Stack, video: Path) -> None:
    stack.start_api()
    with stack.client as client:
        for directory in (
            "uploads",
            "jobs",
        ):  # what is received goes to the one, what is accepted to the other
            shutil.rmtree(stack.data_dir / directory)
            answer = post(client, video)
            assert_problem(answer, 503, "storage_unavailable")
            assert int(answer.headers["retry-after"]) > 0
            (stack.data_dir / directory).mkdir()
        assert client.get("/jobs").json()["items"] == []
        assert post(client, video).status_code == 202


def test_room_is_left_for_no_more_jobs_than_may_wait_however_they_come(stack: Stack, video: Path) -> None:
    stack.start_api(max_queued_jobs=2)
    body = video.read_bytes()
    lines = ("POST /jobs HTTP/1.1", "Host: [::1]", "Content-Type: video/mp4", f"Content-Length: {len(body)}")
    head = "\r\n".join((*lines, "", ""))
    uploads = [socket.create_connection(("127.0.0.1", stack.port), timeout=60) for _ in range(6)]
    statuses = []
    for upload in uploads:
        upload.sendall(head.encode() + body[:-1])
    wait_until(lambda: len(list((stack.data_dir / "uploads").iterdir())) == 6)  # all have found room
    for upload in uploads:
        upload.sendall(body[-1:])
        with upload, upload.makefile("rb") as answer:
            statuses.append(int(answer.readline().split()[1]))
    assert statuses == [202, 202, 503, 503, 503, 503]
    with stack.client as client:
        assert len(client.get("/jobs").json()["items"]) == 2


def test_clients_that_vanish_leave_no_file_and_no_descriptor(stack: Stack, video: Path) -> None:
    api = psutil.Process(stack.start_api().pid)
    body = video.read_bytes()
    form = b'--limit\r\nContent-Disposition: form-data; name="video"\r\n\r\n' + body + b"\r\n--limit--\r\n"
    requests = [
        b"POST /jobs HTTP/1.1\r\nHost: [::1]\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s"
        % (content_type, len(content) + 1, content)  # never whole
        for content_type, content in [(b"video/mp4", body), (b"multipart/form-data; boundary=limit", form)]
    ]
    generator = random.Random(0)

    def vanish(number: int) -> None:
        request = requests[number % 2]
        sent = generator.randrange(len(request))
        with socket.create_connection(("127.0.0.1", stack.port), timeout=60) as connection:
            connection.sendall(request[:sent])
            if number % 3:
                time.sleep(generator.random() / 20)  # the API gets as far as the disk
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    with stack.client as client:
        for number in range(20):
            vanish(number)
        post(client, video)
        descriptors = api.num_fds()
        for number in range(100):
            vanish(number)
        assert post(client, video).status_code == 202
        wait_until(lambda: not list((stack.data_dir / "uploads").iterdir()))
        wait_until(lambda: api.num_fds() <= descriptors)
        assert len(client.get("/jobs").json()["items"]) == 2


def test_what_a_killed_api_was_receiving_is_removed(stack: Stack, video: Path) -> None:
    api = stack.start_api()
    head = b"POST /jobs HTTP/1.1\r\nHost: [::1]\r\nContent-Type: video/mp4\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", stack.port), timeout=60) as upload:
        upload.sendall(head + video.read_bytes())
        wait_until(lambda: list((stack.data_dir / "uploads").iterdir()))
        api.kill()
        api.wait(timeout=10)
    assert files_of_jobs(stack) != []
    stack.start_api(upload_idle_seconds=0.5, probe_timeout_seconds=1, sweep_interval_seconds=0.2)
    wait_until(lambda: files_of_jobs(stack) == [])
    with stack.client as client:
        assert client.get("/jobs").json()["items"] == []


# -- looking up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job_id", [UNKNOWN, "x", "..%2f..%2fetc", "%00", "a" * 300])
def test_unknown_jobs_are_not_found(client: httpx.Client, job_id: str) -> None:
    for method, path in [
        ("GET", f"/jobs/{job_id}"),
        ("POST", f"/jobs/{job_id}/cancel"),
        ("DELETE", f"/jobs/{job_id}"),
        ("GET", f"/jobs/{job_id}/artifacts"),
        ("GET", f"/jobs/{job_id}/artifacts/masks.zip"),
    ]:
        answer = client.request(method, path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


def test_an_unchanged_job_is_answered_with_304(client: httpx.Client, video: Path) -> None:
    url = post(client, video).headers["location"]
    etag = client.get(url).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        assert client.get(url, headers={"if-none-match": known}).status_code == 304
    assert client.get(url, headers={"if-none-match": '"other"'}).status_code == 200


def test_waiting_ends_when_the_job_does(stack: Stack, client: httpx.Client, video: Path) -> None:
    job_id = post(client, video).json()["id"]
    began = time.monotonic()
    assert client.get(f"/jobs/{job_id}?wait=1").json()["status"] == "queued"
    assert time.monotonic() - began >= 1
    succeed(stack, job_id)
    answer = client.get(f"/jobs/{job_id}?wait=30")
    assert answer.json()["status"] == "succeeded"
    assert "retry-after" not in answer.headers
    assert_problem(client.get(f"/jobs/{job_id}?wait=31"), 422, "invalid_options")


def test_whoever_waits_is_answered_when_the_api_is_told_to_end(stack: Stack, video: Path) -> None:
    api = stack.start_api()
    job_id = stack.post(video)["id"]
    answers: list[httpx.Response] = []

    def wait() -> None:
        with stack.client as client:
            answers.append(client.get(f"/jobs/{job_id}?wait=30"))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(1)
    api.terminate()
    waiting.join(timeout=8)
    assert [answer.json()["status"] for answer in answers] == ["queued"]
    api.wait(timeout=10)


def test_jobs_are_listed_in_pages_newest_first(client: httpx.Client, video: Path) -> None:
    ids = [post(client, video).json()["id"] for _ in range(5)]
    client.post(f"/jobs/{ids[2]}/cancel")
    seen, cursor = [], None
    while True:
        page = client.get("/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ids[::-1]
    assert [job["id"] for job in client.get("/jobs?status=canceled").json()["items"]] == [ids[2]]
    assert_problem(client.get("/jobs?limit=0"), 422, "invalid_options")
    assert_problem(client.get("/jobs?status=lost"), 422, "invalid_options")


# -- canceling and deleting ------------------------------------------------------------------------------


def test_a_queued_job_is_canceled_at_once_and_leaves_the_queue(
    client: httpx.Client, redis: Redis, video: Path
) -> None:
    job_id = post(client, video).json()["id"]
    answer = client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "canceled")
    assert redis.llen("rq:queue:imcnet") == 0
    again = client.post(f"/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "canceled")


def test_a_deleted_job_is_gone_with_its_files(stack: Stack, client: httpx.Client, video: Path) -> None:
    job_id = post(client, video).json()["id"]
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    for answer in (client.get(f"/jobs/{job_id}"), client.delete(f"/jobs/{job_id}")):
        assert_problem(answer, 410, "job_gone")
    assert client.get("/jobs").json() == {"items": [], "next_cursor": None}
    assert files_of_jobs(stack) == [job_id]


def test_a_job_that_has_succeeded_cannot_be_canceled(stack: Stack, client: httpx.Client, video: Path) -> None:
    job_id = post(client, video).json()["id"]
    succeed(stack, job_id)
    answer = client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


# -- artifacts -------------------------------------------------------------------------------------------


def test_artifacts_are_not_ready_before_the_job_has_succeeded(client: httpx.Client, video: Path) -> None:
    job_id = post(client, video).json()["id"]
    assert client.get(f"/jobs/{job_id}/artifacts").json() == []
    assert_problem(client.get(f"/jobs/{job_id}/artifacts/masks.zip"), 409, "artifact_not_ready")


def test_artifacts_come_whole_in_ranges_and_as_headers_only(
    stack: Stack, client: httpx.Client, video: Path
) -> None:
    job_id = post(client, video).json()["id"]
    artifact = succeed(stack, job_id)
    (listed,) = client.get(f"/jobs/{job_id}/artifacts").json()
    url = listed["url"]
    assert listed == {**artifact.model_dump(), "url": f"/jobs/{job_id}/artifacts/masks.zip"}

    whole = client.get(url)
    assert whole.content == BODY
    assert whole.headers["etag"] == f'"{artifact.sha256}"'
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-disposition"] == 'attachment; filename="masks.zip"'

    head = client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(BODY))

    part = client.get(url, headers={"range": "bytes=5-14"})
    assert (part.status_code, part.content) == (206, BODY[5:15])
    assert part.headers["content-range"] == f"bytes 5-14/{len(BODY)}"
    stale = client.get(url, headers={"range": "bytes=5-14", "if-range": '"old"'})
    assert (stale.status_code, stale.content) == (200, BODY)

    assert client.get(url, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    beyond = client.get(url, headers={"range": f"bytes={len(BODY)}-"})
    assert_problem(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{len(BODY)}"
    assert_problem(client.get(url.replace("masks", "other")), 404, "artifact_not_found")


def test_a_damaged_artifact_is_never_served(stack: Stack, client: httpx.Client, video: Path) -> None:
    job_id = post(client, video).json()["id"]
    succeed(stack, job_id)
    url = f"/jobs/{job_id}/artifacts/masks.zip"
    etag = client.get(url).headers["etag"]
    (stored,) = stack.data_dir.rglob("masks.zip")
    stored.write_bytes(BODY[:-1] + b"X")
    for headers in ({}, {"range": "bytes=0-9"}, {"range": "bytes=0-9,20-29"}):
        assert_problem(client.get(url, headers=headers), 500, "artifact_damaged")
    assert client.head(url).status_code == 200
    assert client.get(url, headers={"if-none-match": etag}).status_code == 304
    stored.unlink()
    assert_problem(client.get(url), 500, "artifact_damaged")
    stored.write_bytes(BODY)
    assert client.get(url).content == BODY


def test_a_job_that_is_deleted_while_it_is_downloaded(stack: Stack, video: Path) -> None:
    api = psutil.Process(stack.start_api().pid)
    body = os.urandom(16 * 2**20)
    with stack.client as client:
        job_id = post(client, video).json()["id"]
        succeed(stack, job_id, body)
        url = f"/jobs/{job_id}/artifacts/masks.zip"
        with client.stream("GET", url) as download:
            pieces = download.iter_bytes()
            received = next(pieces)
            client.delete(f"/jobs/{job_id}").raise_for_status()
            assert_problem(client.get(url), 410, "job_gone")
            received += b"".join(pieces)
        assert received == body
    wait_until(lambda: not [file for file in api.open_files() if "masks.zip" in file.path])


def test_whoever_downloads_while_jobs_are_deleted_gets_all_or_410(stack: Stack, video: Path) -> None:
    stack.start_api()
    for _ in range(5):
        job_id = stack.post(video)["id"]
        succeed(stack, job_id)
        answers = download_until_deleted(stack, job_id)
        assert {answer.status_code for answer in answers} == {200, 410}
        for answer in answers:
            if answer.status_code == 200:
                assert answer.content == BODY
            else:
                assert_problem(answer, 410, "job_gone")


def download_until_deleted(stack: Stack, job_id: str) -> list[httpx.Response]:
    answers: list[httpx.Response] = []

    def download() -> None:
        with stack.client as client:
            while not answers or answers[-1].status_code == 200:
                answers.append(client.get(f"/jobs/{job_id}/artifacts/masks.zip"))

    threads = [threading.Thread(target=download) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: answers)
    with stack.client as client:
        client.delete(f"/jobs/{job_id}").raise_for_status()
    for thread in threads:
        thread.join(timeout=20)
    return answers


# -- the service itself ----------------------------------------------------------------------------------


def test_health_and_version_are_told(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"alive": True}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["ready"], ready.json()["workers"]) == (200, True, 0)
    assert client.get("/version").json()["workers"] == []
    assert client.head("/readyz").status_code == 200


def test_unknown_paths_and_methods_are_problems_too(client: httpx.Client) -> None:
    assert_problem(client.get("/nothing"), 404, "not_found")
    answer = client.put("/jobs")
    assert_problem(answer, 405, "method_not_allowed")
    assert "POST" in answer.headers["allow"]


def test_links_are_below_the_root_path(stack: Stack, video: Path) -> None:
    stack.start_api(root_path="/segment")
    assert stack.post(video)["links"]["self"].startswith("/segment/jobs/")


def test_without_redis_the_api_says_so_at_once_and_loses_nothing(
    stack: Stack, tmp_path: Path, video: Path
) -> None:
    from service.embedded import EmbeddedRedis

    with EmbeddedRedis(tmp_path / "own-redis") as server:
        stack.start_api(redis_url=server.url)
        waiting, done = stack.post(video)["id"], stack.post(video)["id"]
        succeed(stack, done)
    with stack.client as client:
        for answer in (post(client, video), client.get(f"/jobs/{waiting}")):
            assert_problem(answer, 503, "queue_unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert client.get(f"/jobs/{done}").json()["status"] == "succeeded"
        assert client.get(f"/jobs/{done}/artifacts/masks.zip").content == BODY
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        assert client.get("/version").json()["workers"] is None


def test_a_job_that_redis_has_forgotten_is_queued_again(stack: Stack, redis: Redis, video: Path) -> None:
    stack.start_api(sweep_interval_seconds=0.2)
    job_id = stack.post(video)["id"]
    redis.flushall()
    deadline = time.monotonic() + 20
    while redis.llen("rq:queue:imcnet") == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert stack.job(job_id)["queue_position"] == 1
