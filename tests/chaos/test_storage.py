"""Rows 15, 18 and 19: the storage is full, read-only, slow, or damaged; a job goes while it is downloaded."""

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.chaos.client import Client
from tests.chaos.conftest import Row, Scale
from tests.chaos.disk import fill, read_only, small_disk
from tests.chaos.faults import engine, stopped
from tests.chaos.invariants import backward_moves, leftovers, require, unexcused_errors, unfinished_jobs
from tests.chaos.rig import LEASE_SECONDS, Rig
from tests.chaos.sabotage import slow_storage
from tests.chaos.uploads import Upload
from tests.integration.conftest import eventually
from tests.videos import noise, write_video

pytestmark = [pytest.mark.chaos, pytest.mark.processes]

MIB = 2**20
PAGE_BYTES = 4096
DISK_BYTES = 8 * MIB
WELL_AGAIN_SECONDS = 15
SHORT, LONG = 40, 400  # frames


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., Rig], clip: Callable[[int], Path]) -> Iterator[Rig]:
    """Its data are on a small disk of their own."""
    rig = make_rig()
    with small_disk(rig.data_dir, size_bytes=DISK_BYTES):
        rig.start_api()
        rig.start_worker()
        for frames in (SHORT, LONG):
            rig.learn(clip(frames))
        yield rig
        rig.stop()


def is_well(rig: Rig, client: Client, video: Path) -> None:
    """A job is accepted and done by the same engine as ever: nothing had to be started again."""
    engine_pid = rig.workers()[0]["engine_pid"]
    assert client.ended(client.accepted(video))["status"] == "succeeded"
    assert [worker["engine_pid"] for worker in rig.workers()] == [engine_pid]


def is_clean(rig: Rig, *, kept: str = "") -> None:
    """Nothing is left of jobs and uploads but of the one that is kept, or will be in a moment."""
    look = partial(leftovers, rig.data_dir, rig.server.client, kept=[kept])
    eventually(lambda: not look(), within_seconds=20, what="nothing is left")


# -- full ------------------------------------------------------------------------------------------------


def declare_too_much(rig: Rig, client: Client, body: bytes) -> Upload:
    fill(rig.data_dir, but_bytes=len(body))
    return Upload(rig.port, length_bytes=len(body))


def fill_up_meanwhile(rig: Rig, client: Client, body: bytes) -> Upload:
    upload = Upload(rig.port, length_bytes=None)
    upload.send(body[: len(body) // 2])
    fill(rig.data_dir)
    upload.send(body[len(body) // 2 :])
    upload.finish()
    return upload


def send_more_than_fits(rig: Rig, client: Client, body: bytes) -> Upload:
    fill(rig.data_dir, but_bytes=len(body) // 2)
    upload = Upload(rig.port, length_bytes=None)
    upload.send(body)
    upload.finish()
    return upload


def leave_no_room_for_the_job(rig: Rig, client: Client, body: bytes) -> Upload:
    """The video fits, and what is to be written of it does not."""
    fill(rig.data_dir, but_bytes=len(body) + -len(body) % PAGE_BYTES)
    upload = Upload(rig.port, length_bytes=None)
    upload.send(body)
    upload.finish()
    return upload


@pytest.mark.parametrize(
    "run_full",
    [
        pytest.param(way, marks=pytest.mark.row(15, f"disk full at an upload: {way.__name__}"))
        for way in (declare_too_much, fill_up_meanwhile, send_more_than_fits, leave_no_room_for_the_job)
    ],
)
def test_an_upload_that_finds_no_room_is_refused_and_leaves_nothing(
    rig: Rig,
    clip: Callable[[int], Path],
    scale: Scale,
    row: Row,
    run_full: Callable[[Rig, Client, bytes], Upload],
) -> None:
    for _ in range(scale.of(quick=1, full=4)):
        with rig.trial() as client:
            done = client.accepted(clip(SHORT))
            client.ended(done)
            with (
                rig.history.during("the disk is full"),
                run_full(rig, client, clip(LONG).read_bytes()) as upload,
            ):
                answer = upload.answer()
                assert (answer.status, answer.headers["Retry-After"]) == (507, "60")
                assert b'"storage_full"' in answer.read()
                is_clean(rig, kept=done)
                assert client.download(done)
                (rig.data_dir / "ballast").unlink()
            is_well(rig, client, clip(SHORT))
        row.runs += 1


@pytest.mark.row(15, "disk full in the worker")
def test_a_job_that_finds_no_room_fails_and_the_next_one_is_fine(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    ends = []
    for _ in range(scale.of(quick=1, full=5)):
        with rig.trial() as client:
            job_id = client.accepted(clip(LONG))
            client.running(job_id, frames=chance.randint(1, LONG // 2))
            ballast = fill(rig.data_dir)
            began_at = time.monotonic()
            job = client.ended(job_id)
            ends.append(time.monotonic() - began_at)
            assert (job["status"], job["attempt"], job["error"]["code"]) == ("failed", 1, "storage_full")
            ballast.unlink()
            is_well(rig, client, clip(SHORT))
        row.runs += 1
    row.slowest("end of the job", ends, limit_seconds=WELL_AGAIN_SECONDS)


@pytest.mark.row(15, "disk so full that not even the outcome fits")
def test_a_job_whose_outcome_finds_no_room_fails_as_soon_as_there_is_some(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    ends = []
    for _ in range(scale.of(quick=1, full=3)):
        with rig.trial() as client:
            (worker,) = rig.living_workers
            with stopped(engine(worker)):  # no mask is made yet, and so none can make room for the outcome
                job_id = client.accepted(clip(LONG))
                client.watch(
                    job_id, lambda job: job["status"] == "running", within_seconds=20, what="the job runs"
                )
                ballast = fill(rig.data_dir)
            time.sleep(2 * LEASE_SECONDS)
            job = client.job(job_id)
            assert job is not None
            assert job["status"] in ("queued", "running"), job
            ballast.unlink()
            began_at = time.monotonic()
            job = client.ended(job_id)
            ends.append(time.monotonic() - began_at)
            assert (job["status"], job["attempt"], job["error"]["code"]) == ("failed", 1, "storage_full")
            is_well(rig, client, clip(SHORT))
        row.runs += 1
    row.slowest("end of the job", ends, limit_seconds=WELL_AGAIN_SECONDS)


# -- read-only, slow -------------------------------------------------------------------------------------


@pytest.mark.row(15, "storage read-only for a while")
def test_a_job_survives_that_the_storage_is_read_only_for_a_while(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    for _ in range(scale.of(quick=1, full=3)):
        with rig.trial() as client:
            done = client.accepted(clip(SHORT))
            client.ended(done)
            running = client.accepted(clip(LONG))
            client.running(running, frames=chance.randint(1, LONG // 2))
            waiting = client.accepted(clip(SHORT))
            with rig.history.during("the storage is read-only"), read_only(rig.data_dir):
                refused = client.call("POST", "/jobs", files={"video": clip(SHORT).read_bytes()})
                assert refused is not None
                assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
                assert int(refused.headers["Retry-After"]) > 0
                ready = client.call("GET", "/readyz")
                assert ready is not None
                assert (ready.status_code, ready.json()["storage"]) == (503, False)
                assert client.download(done)
                time.sleep(2 * LEASE_SECONDS)
            for job_id in (running, waiting):
                job = client.ended(job_id)
                assert job["status"] == "succeeded", job
            is_well(rig, client, clip(SHORT))
        row.runs += 1


@pytest.mark.row(15, "every fsync takes a second")
def test_a_slow_storage_slows_down_only_those_who_write(
    make_rig: Callable[..., Rig], clip: Callable[[int], Path], scale: Scale, row: Row
) -> None:
    uploads = scale.of(quick=3, full=8)
    rig = make_rig()
    rig.start_api(environment=slow_storage(seconds=1))
    worker = rig.start_worker()
    rig.learn(clip(SHORT))
    rig.dismiss(worker)
    rig.start_worker(environment=slow_storage(seconds=0.2))
    delays = []
    with rig.trial() as client, ThreadPoolExecutor(uploads) as threads:
        watched = client.accepted(clip(SHORT))
        posting = [threads.submit(post, rig, clip(SHORT), f"{number}") for number in range(uploads)]
        while not all(each.done() for each in posting):
            asked_at = time.monotonic()
            assert client.job(watched)
            delays.append(time.monotonic() - asked_at)
            time.sleep(0.02)
            row.runs = sum(each.done() for each in posting)
        for each in posting:
            assert client.ended(each.result(), within_seconds=200)["status"] == "succeeded"
        client.ended(watched)
    row.slowest("status", delays, limit_seconds=1)


def post(rig: Rig, video: Path, name: str) -> str:
    with rig.new_client(name) as client:
        return client.accepted(video)


# -- damaged ---------------------------------------------------------------------------------------------


@pytest.mark.row(18, "a byte flipped in a stored archive")
def test_a_damaged_archive_is_never_served_as_good(
    rig: Rig, clip: Callable[[int], Path], scale: Scale, chance: random.Random, row: Row
) -> None:
    rig.learn(clip(SHORT), artifacts=["masks", "overlay"])
    with rig.trial() as client:
        job_id = client.accepted(clip(SHORT), artifacts=["masks", "overlay"])
        client.ended(job_id)
        url = f"/jobs/{job_id}/artifacts"
        good = client.download(job_id)
        assert good is not None
        (archive,) = (rig.data_dir / "jobs" / job_id).glob("artifacts-*/masks.zip")
        for _ in range(scale.of(quick=20, full=300)):
            place = chance.randrange(len(good))
            damaged = bytearray(good)
            damaged[place] ^= 1 << chance.randrange(8)
            begin = chance.randrange(len(good))
            end = chance.randrange(begin, len(good))
            archive.write_bytes(damaged)
            with rig.history.during("a byte is flipped"):
                for wanted in ({}, {"Range": f"bytes={begin}-{end}"}, {"Range": f"bytes={place}-{place}"}):
                    is_refused_as_damaged(client, f"{url}/masks.zip", wanted)
                other = client.call("GET", f"{url}/overlay.mp4", job_id=job_id)
                assert other is not None
                assert f'"{hashlib.sha256(other.content).hexdigest()}"' == other.headers["ETag"]
            archive.write_bytes(good)
            part = client.call("GET", f"{url}/masks.zip", headers={"Range": f"bytes={begin}-{end}"})
            assert part is not None
            assert (part.status_code, part.content) == (206, good[begin : end + 1])
            row.runs += 1
        for damaged_length in (good[:-1], good + b"\0", b""):
            with rig.history.during("the archive has another length"):
                archive.write_bytes(damaged_length)
                is_refused_as_damaged(client, f"{url}/masks.zip", {})
        with rig.history.during("the archive is missing"):
            archive.unlink()
            is_refused_as_damaged(client, f"{url}/masks.zip", {})
        archive.write_bytes(good)


def is_refused_as_damaged(client: Client, url: str, headers: dict[str, str]) -> None:
    answer = client.call("GET", url, headers=headers)
    assert answer is not None
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")


# -- gone meanwhile --------------------------------------------------------------------------------------


@contextmanager
def slow_download(rig: Rig, url: str) -> Iterator[Callable[[], bytes]]:
    """A download of which the first bytes have come. Yields: What reads the rest, and returns all of it."""
    with httpx.Client(base_url=rig.url, timeout=60) as client, client.stream("GET", url) as answer:
        assert answer.status_code == 200
        pieces = answer.iter_raw(chunk_size=1000)
        first = next(pieces)
        yield lambda: first + b"".join(pieces)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("deletion", marks=pytest.mark.row(19, "deletion during downloads")),
        pytest.param("expiry", marks=pytest.mark.row(19, "expiry during downloads")),
    ],
)
def test_a_download_outlives_its_job(
    make_rig: Callable[..., Rig], tmp_path: Path, scale: Scale, row: Row, end: str
) -> None:
    video = write_video(tmp_path / "noise.mp4", noise(100, width=640, height=480))  # more than sockets hold
    rig = make_rig(retention_seconds=4 if end == "expiry" else 1000)
    rig.start_api()
    rig.start_worker()
    api = psutil.Process(rig.api.pid)
    with rig.new_client("client") as client:
        for _ in range(scale.of(quick=1, full=2)):
            job_id = client.accepted(video, artifacts=["overlay"])
            (artifact,) = client.ended(job_id)["artifacts"]
            with ExitStack() as stack:
                downloads = [
                    stack.enter_context(slow_download(rig, artifact["url"]))
                    for _ in range(scale.of(quick=3, full=8))
                ]
                if end == "deletion":
                    assert client.delete(job_id)
                eventually(partial(is_gone, client, job_id), within_seconds=20, what="the job is gone")
                assert is_gone(client, job_id, path=artifact["url"])
                assert open_artifacts(api) >= len(downloads), "the downloads were over before the job was"
                for rest in downloads:
                    assert hashlib.sha256(rest()).hexdigest() == artifact["sha256"]
                    row.runs += 1
            eventually(lambda: not open_artifacts(api), within_seconds=10, what="all files are closed")
        is_clean(rig)
    require(unfinished_jobs(rig.history) + backward_moves(rig.history) + unexcused_errors(rig.history))


def is_gone(client: Client, job_id: str, *, path: str | None = None) -> bool:
    answer = client.call("GET", path or f"/jobs/{job_id}")
    return answer is not None and answer.status_code == 410


def open_artifacts(api: psutil.Process) -> int:
    """How many files of downloads the API still has open, one or two for each; they have no name any more."""
    count = 0
    for entry in Path(f"/proc/{api.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += "overlay.mp4" in str(entry.readlink())
    return count
