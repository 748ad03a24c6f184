"""Rows 8, 10, 11 and 16: clients that vanish, repeat themselves, drip, or change their minds."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from threading import Barrier
from uuid import uuid4

import httpx
import psutil
import pytest

from tests.chaos.client import Client, identity
from tests.chaos.conftest import Row, Scale
from tests.chaos.faults import horse, kill
from tests.chaos.invariants import leftovers
from tests.chaos.rig import Rig
from tests.chaos.uploads import Upload
from tests.integration.conftest import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

MIB = 2**20
SWEPT_SECONDS = 20
WORKER_FREE_SECONDS = 5
STATUS_SECONDS = 1.0  # of the slowest in a hundred; what is meant is 0.2
MORE_MEMORY_BYTES = 100 * MIB


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig]) -> Rig:
    """Without a worker; what an upload leaves behind is swept after five seconds."""
    rig = make_rig(upload_idle_seconds=1, probe_timeout_seconds=3)
    rig.start_api()
    return rig


@pytest.fixture(scope="module")
def working(make_rig: Callable[..., Rig]) -> Rig:
    rig = make_rig()
    rig.start_api()
    rig.start_worker()
    return rig


def jobs_of(client: Client) -> list[object]:
    answer = client.call("GET", "/jobs")
    assert answer is not None
    items: list[object] = answer.json()["items"]
    return items


def is_well(client: Client, video: Path) -> None:
    """An upload is accepted as ever; without a worker, there is nothing more to it."""
    job_id = client.accepted(video)
    assert client.delete(job_id)


def descriptors(api: psutil.Process, rig: Rig) -> int:
    """How many files and sockets are open, but for those to Redis, which are kept for the next time."""
    to_redis = [c for c in api.net_connections() if c.raddr and c.raddr.port == rig.server.port]
    return api.num_fds() - len(to_redis)


# -- clients that vanish ---------------------------------------------------------------------------------


@pytest.mark.row(8, "kill -9 of the API in the middle of uploads")
def test_an_api_that_is_killed_in_the_middle_of_uploads_leaves_nothing(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    body = chance.randbytes(3 * MIB)
    cleared = []
    for _ in range(scale.of(quick=1, full=10)):
        with rig.trial() as client, ExitStack() as stack:
            for _ in range(10):
                upload = stack.enter_context(Upload(rig.port, length_bytes=len(body)))
                upload.send(body[: chance.randrange(len(body))])
            eventually(
                lambda: len(list((rig.data_dir / "uploads").glob("*.part"))) == 10,
                within_seconds=10,
                what="all uploads are under way",
            )
            assert kill(psutil.Process(rig.api.pid))
            rig.api.wait()
            rig.replace_the_dead()
            began_at = time.monotonic()
            eventually(
                lambda: not leftovers(rig.data_dir, rig.server.client),
                within_seconds=SWEPT_SECONDS,
                what="what the uploads have left is swept",
            )
            cleared.append(time.monotonic() - began_at)
            assert jobs_of(client) == []
            is_well(client, clip(5))
        row.runs += 1
    row.slowest("sweep", cleared, limit_seconds=SWEPT_SECONDS)


@pytest.mark.row(8, "clients vanish (RST) at random offsets of their uploads")
def test_clients_that_vanish_leave_nothing_behind(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    body = chance.randbytes(3 * MIB)
    api = psutil.Process(rig.api.pid)
    with rig.trial() as client:
        is_well(client, clip(5))
        before = descriptors(api, rig)
        for _ in range(scale.of(quick=30, full=100)):
            length_bytes = chance.choice((len(body), None))
            with Upload(rig.port, length_bytes=length_bytes) as upload:
                upload.send(body[: chance.randrange(len(body))])
                upload.vanish()
            row.runs += 1
        eventually(lambda: descriptors(api, rig) <= before, within_seconds=10, what="descriptors are closed")
        assert jobs_of(client) == []
        eventually(
            lambda: not leftovers(rig.data_dir, rig.server.client), within_seconds=10, what="all is removed"
        )
        is_well(client, clip(5))
    row.figures["descriptors"] = f"{before} before, {descriptors(api, rig)} after"


# -- clients that repeat themselves ----------------------------------------------------------------------


@pytest.mark.row(10, "50 parallel POSTs with one Idempotency-Key")
def test_fifty_posts_with_one_key_make_one_job(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    posts = 50
    for _ in range(scale.of(quick=1, full=10)):
        with rig.trial() as client, ThreadPoolExecutor(posts) as threads:
            post = partial(post_with_key, rig, clip(5), str(uuid4()), Barrier(posts))
            answers = list(threads.map(post, map(str, range(posts))))
            assert [answer.status_code for answer in answers] == [202] * posts
            assert all(one.json() == other.json() for one, other in pairwise(answers))
            replays = sum(answer.headers.get("Idempotency-Replayed") == "true" for answer in answers)
            assert replays == posts - 1
            assert len(jobs_of(client)) == 1
            (job_id,) = rig.history.acknowledged
            assert client.cancel(job_id)
            assert client.ended(job_id)["status"] == "canceled"
        row.runs += 1


def post_with_key(rig: Rig, video: Path, key: str, together: Barrier, name: str) -> httpx.Response:
    with rig.new_client(name) as client:
        together.wait()
        answer = client.call(
            "POST",
            "/jobs",
            sent=identity(video),
            content=video.read_bytes(),
            headers={"Content-Type": "video/mp4", "Idempotency-Key": key},
        )
        assert answer is not None
        return answer


# -- clients that drip -----------------------------------------------------------------------------------


@pytest.mark.row(11, "300 dripping and 50 idle clients")
def test_clients_that_drip_or_stop_are_dropped_and_cost_others_nothing(
    make_rig: Callable[..., Rig], clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    idle_seconds = scale.of(quick=4, full=30)
    rig = make_rig(upload_idle_seconds=idle_seconds)
    api = psutil.Process(rig.start_api().pid)
    with rig.trial() as client, ExitStack() as stack:
        is_well(client, clip(5))
        job_id = client.accepted(clip(5))
        before_bytes = peak_bytes = api.memory_info().rss
        began_at: dict[Upload, float] = {}
        for _ in range(350):
            upload = stack.enter_context(Upload(rig.port, length_bytes=MIB))
            upload.send(b"video")
            began_at[upload] = time.monotonic()
        dripping = list(began_at)[:300]
        waits, delays = [], []
        while began_at:
            for upload in [upload for upload in began_at if upload.is_answered()]:
                answer = upload.answer()
                assert answer.status == 408
                assert json.loads(answer.read())["code"] == "request_timeout"
                waits.append(time.monotonic() - began_at.pop(upload))
            assert not began_at or time.monotonic() - min(began_at.values()) < 2 * idle_seconds + 10
            for upload in dripping:
                if upload in began_at:
                    with suppress(ConnectionError):  # it has just been answered
                        upload.send(b".")
            for _ in range(10):
                asked_at = time.monotonic()
                assert client.job(job_id)
                delays.append(time.monotonic() - asked_at)
            peak_bytes = max(peak_bytes, api.memory_info().rss)
            row.runs = len(waits)
        assert min(waits) >= idle_seconds - 1
        assert client.cancel(job_id)
        client.ended(job_id)
    *_, p99 = quantiles(delays, n=100)
    row.slowest("408", waits, limit_seconds=2 * idle_seconds + 10)
    row.figures["status p99"] = f"{1000 * p99:.0f} ms"
    row.figures["more memory"] = f"{(peak_bytes - before_bytes) / MIB:.0f} MiB"
    assert p99 < STATUS_SECONDS
    assert peak_bytes - before_bytes < MORE_MEMORY_BYTES


# -- clients that change their minds ---------------------------------------------------------------------


@pytest.mark.row(16, "cancel at a random moment")
def test_of_cancel_and_success_exactly_one_happens_and_the_worker_is_free(
    working: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    video = clip(12)
    working.learn(video)
    (worker,) = working.living_workers
    ends: Counter[str] = Counter()
    freed = []
    with working.trial() as client:
        began_at = time.monotonic()
        client.ended(client.accepted(video))
        usual_seconds = time.monotonic() - began_at
        for _ in range(scale.of(quick=25, full=500)):
            job_id = client.accepted(video)
            time.sleep(chance.uniform(0, usual_seconds))
            answer = client.call("POST", f"/jobs/{job_id}/cancel", job_id=job_id)
            asked_at = time.monotonic()
            assert answer is not None
            job = client.ended(job_id, within_seconds=30)
            eventually(lambda: not horse(worker), within_seconds=30, what="the worker is free")
            freed.append(time.monotonic() - asked_at)
            assert job["status"] == {202: "canceled", 200: "succeeded"}[answer.status_code]
            assert bool(job["artifacts"]) == (job["status"] == "succeeded")
            ends[job["status"]] += 1
            row.runs += 1
    assert working.living_workers == [worker]
    row.slowest("release of the worker", freed, limit_seconds=WORKER_FREE_SECONDS)
    row.figures.update({end: str(count) for end, count in sorted(ends.items())})
    assert len(ends) == 2, "the moments were all too early or too late"
