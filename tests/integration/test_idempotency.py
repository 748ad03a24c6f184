"""``Idempotency-Key``: whatever happens to a request, the same one again makes no second job."""

import asyncio
import random
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from redis import Redis

from service.embedded import EmbeddedRedis
from service.idempotency import Claim, IdempotencyKeys
from service.storage import JobStorage, new_job_id
from tests.integration.conftest import Stack
from tests.integration.test_api import assert_problem, succeed
from tests.videos import moving_square, write_video
from tests.waiting import wait_until

pytestmark = pytest.mark.processes

KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", moving_square(5))


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    stack.start_api()
    with stack.client as client:
        yield client


def post(client: httpx.Client, video: Path, key: str = KEY, **options: str) -> httpx.Response:
    headers = {"content-type": "video/mp4", "idempotency-key": key}
    return client.post("/jobs", params=options, content=video.read_bytes(), headers=headers)


def replayed(answer: httpx.Response) -> bool:
    return answer.headers.get("idempotency-replayed") == "true"


def job_ids(stack: Stack) -> list[str]:
    return list(JobStorage(stack.data_dir).job_ids())


# -- the same request ------------------------------------------------------------------------------------


def test_the_same_request_again_is_answered_with_the_same_job(
    stack: Stack, client: httpx.Client, video: Path
) -> None:
    first = post(client, video)
    assert first.status_code == 202
    assert "idempotency-replayed" not in first.headers
    for _ in range(2):
        again = post(client, video)
        assert (again.status_code, again.json(), replayed(again)) == (202, first.json(), True)
        assert again.headers["location"] == first.headers["location"]
    succeed(stack, first.json()["id"])
    later = post(client, video)
    assert (later.status_code, later.json()["status"], replayed(later)) == (202, "succeeded", True)
    assert job_ids(stack) == [first.json()["id"]]


def test_form_and_bare_video_are_the_same_request_where_they_mean_the_same(
    client: httpx.Client, video: Path
) -> None:
    first = post(client, video, threshold="0.25")
    form = client.post(
        "/jobs",
        files={"video": ("another-name.mp4", video.read_bytes())},
        data={"threshold": "0.250", "quality": "exact"},
        headers={"idempotency-key": KEY},
    )
    assert (form.status_code, form.json(), replayed(form)) == (202, first.json(), True)


def test_another_request_with_the_same_key_is_refused(
    stack: Stack, client: httpx.Client, video: Path, tmp_path: Path
) -> None:
    first = post(client, video).json()
    other = write_video(tmp_path / "other.mp4", moving_square(4))
    assert_problem(post(client, other), 422, "idempotency_key_reused")
    assert_problem(post(client, video, threshold="0.25"), 422, "idempotency_key_reused")
    assert post(client, video).json() == first
    assert post(client, other, key="another").status_code == 202
    assert len(job_ids(stack)) == 2


def test_without_a_key_every_request_makes_a_job(stack: Stack, video: Path) -> None:
    stack.start_api()
    assert stack.post(video)["id"] != stack.post(video)["id"]


@pytest.mark.parametrize("key", [b"", b"x" * 256, b"\xc3\xa4", b"tab\there"])
def test_odd_keys_are_refused(client: httpx.Client, video: Path, key: bytes) -> None:
    headers = [(b"content-type", b"video/mp4"), (b"idempotency-key", key)]
    assert_problem(client.post("/jobs", content=video.read_bytes(), headers=headers), 400, "bad_request")


def test_fifty_at_once_on_two_servers_make_one_job(stack: Stack, video: Path) -> None:
    ports = []
    for _ in range(2):
        stack.start_api()
        ports.append(stack.port)

    def send(number: int) -> httpx.Response:
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[number % 2]}", timeout=120) as client:
            return post(client, video)

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(send, range(50)))
    assert [answer.status_code for answer in answers] == [202] * 50
    assert len({answer.text for answer in answers}) == 1
    assert sum(not replayed(answer) for answer in answers) == 1
    assert job_ids(stack) == [answers[0].json()["id"]]


# -- what becomes of the job, of Redis and of the answer -------------------------------------------------


def test_a_job_that_is_gone_is_not_made_again(stack: Stack, client: httpx.Client, video: Path) -> None:
    job_id = post(client, video).json()["id"]
    client.delete(f"/jobs/{job_id}").raise_for_status()
    assert_problem(post(client, video), 410, "job_gone")
    assert job_ids(stack) == []


def test_an_answer_that_was_lost_is_got_again(stack: Stack, client: httpx.Client, video: Path) -> None:
    body = video.read_bytes()
    head = (
        f"POST /jobs HTTP/1.1\r\nHost: [::1]\r\nContent-Type: video/mp4\r\nIdempotency-Key: {KEY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", stack.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
    again = post(client, video)  # at once: whichever comes first makes the job
    assert again.status_code == 202
    wait_until(lambda: job_ids(stack) == [again.json()["id"]])


def test_the_job_is_found_again_whatever_has_become_of_redis(
    stack: Stack, video: Path, tmp_path: Path
) -> None:
    with EmbeddedRedis(tmp_path / "own-redis") as server:
        stack.start_api(redis_url=server.url, max_queued_jobs=1)
        with stack.client as client:
            job_id = post(client, video).json()["id"]
            assert_problem(post(client, video, key="another"), 503, "queue_full")
            assert replayed(post(client, video))  # the queue's being full is of no matter
            with Redis.from_url(server.url) as redis:
                redis.flushall()
            assert (post(client, video).json()["id"], job_ids(stack)) == (job_id, [job_id])
    with stack.client as client:
        again = post(client, video)
        assert (again.status_code, again.json()["id"], replayed(again)) == (202, job_id, True)
        assert again.json()["status"] == "queued"
        assert_problem(post(client, video, key="another"), 503, "queue_unavailable")


def test_a_key_whose_request_has_failed_is_free(stack: Stack, client: httpx.Client, video: Path) -> None:
    broken = video.with_name("broken.mp4")
    broken.write_bytes(b"no video")
    assert_problem(post(client, broken), 422, "not_a_video")
    shutil.rmtree(stack.data_dir / "jobs")
    assert_problem(post(client, video), 503, "storage_unavailable")
    (stack.data_dir / "jobs").mkdir()
    made = post(client, video, threshold="0.25")
    assert (made.status_code, replayed(made)) == (202, False)
    assert job_ids(stack) == [made.json()["id"]]


# -- who dies on the way ---------------------------------------------------------------------------------


def test_a_key_of_a_job_that_was_never_accepted_is_taken_over(
    stack: Stack, client: httpx.Client, video: Path
) -> None:
    async def die_before_accepting() -> None:
        async with IdempotencyKeys(stack.data_dir / "idempotency").held(KEY) as held:
            held.write(Claim(job_id=new_job_id(), fingerprint="of-another-request"))

    asyncio.run(die_before_accepting())
    made = post(client, video)
    assert (made.status_code, replayed(made)) == (202, False)
    assert replayed(post(client, video))


def test_whoever_comes_second_waits_for_the_first(stack: Stack, client: httpx.Client, video: Path) -> None:
    async def hold_while_another_asks() -> httpx.Response:
        async with IdempotencyKeys(stack.data_dir / "idempotency").held(KEY):
            asking = asyncio.create_task(asyncio.to_thread(post, client, video))
            done, _ = await asyncio.wait([asking], timeout=2)
            assert not done
            assert job_ids(stack) == []
        return await asking

    made = asyncio.run(hold_while_another_asks())
    assert (made.status_code, replayed(made)) == (202, False)


def test_an_api_that_is_killed_at_any_time_leaves_one_job(stack: Stack, video: Path) -> None:
    generator = random.Random(0)
    for number in range(6):
        api = stack.start_api()
        key, promised = f"key-{number}", []

        def ask(key: str = key, promised: list[str] = promised) -> None:
            with stack.client as client, suppress(httpx.TransportError):
                promised.append(post(client, video, key=key).json()["id"])

        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(timeout=generator.random() * 0.8)
        api.kill()
        api.wait(timeout=10)
        asking.join(timeout=20)
        before = set(job_ids(stack))
        stack.start_api()
        with stack.client as client:
            again = post(client, video, key=key)
        assert again.status_code == 202
        assert replayed(again) == (again.json()["id"] in before)
        assert promised in ([], [again.json()["id"]])
        assert len(job_ids(stack)) == number + 1


# -- Redis dies in between -------------------------------------------------------------------------------


class TreacherousRedis:
    """Stands before a Redis and is gone, for good, as soon as ``last_words`` match what a client says."""

    def __init__(self, url: str, last_words: bytes) -> None:
        self._upstream = url.removeprefix("unix://")
        self._last_words = re.compile(last_words)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.gone = threading.Event()
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as upstream, suppress(OSError):
            upstream.connect(self._upstream)
            threading.Thread(target=self._answer, args=[upstream, client], daemon=True).start()
            while data := client.recv(65536):
                if self._last_words.search(data) or self.gone.is_set():
                    self.gone.set()
                    self._listener.close()
                    client.shutdown(socket.SHUT_RDWR)
                    return
                upstream.sendall(data)

    def _answer(self, upstream: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := upstream.recv(65536):
                client.sendall(data)


def test_a_job_is_promised_once_it_is_queued_though_redis_dies_then(
    stack: Stack, redis_url: str, video: Path
) -> None:
    treacherous = TreacherousRedis(redis_url, b"imcnet:progress:[0-9a-f]")  # only looked up
    stack.start_api(redis_url=treacherous.url)
    with stack.client as client:
        answer = post(client, video)
        assert treacherous.gone.is_set()
        assert (answer.status_code, answer.json()["status"]) == (202, "queued")
        assert_problem(client.get(answer.headers["location"]), 503, "queue_unavailable")
        assert job_ids(stack) == [answer.json()["id"]]


def test_a_job_that_cannot_be_queued_is_taken_back_and_its_key_is_free(
    stack: Stack, redis_url: str, video: Path
) -> None:
    treacherous = TreacherousRedis(redis_url, b"imcnet:delivering:[0-9a-f]")  # how queueing begins
    stack.start_api(redis_url=treacherous.url)
    with stack.client as client:
        assert_problem(post(client, video), 503, "queue_unavailable")
        assert treacherous.gone.is_set()
    assert job_ids(stack) == []
    assert len(list((stack.data_dir / "tombstones").iterdir())) == 1  # it was there
    stack.start_api()
    with stack.client as client:
        made = post(client, video)
    assert (made.status_code, replayed(made)) == (202, False)
