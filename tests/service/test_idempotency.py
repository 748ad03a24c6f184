"""Keys and the locks on them, between tasks and between processes."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.errors import ImcnetError, InvalidRequest, Misconfigured, StorageFull, StorageUnavailable
from service.idempotency import Claim, IdempotencyKeys, check_key, fingerprint_of
from service.jobs import ArtifactKind, JobOptions
from tests.conftest import REPOSITORY

CLAIM = Claim(job_id="a-job", fingerprint="of-a-video")


@pytest.fixture
def keys(tmp_path: Path) -> IdempotencyKeys:
    keys = IdempotencyKeys(tmp_path / "idempotency")
    keys.prepare()
    return keys


async def claim_of(keys: IdempotencyKeys, key: str) -> Claim | None:
    async with keys.held(key) as held:
        return held.claim


async def use(keys: IdempotencyKeys, key: str, claim: Claim) -> None:
    async with keys.held(key) as held:
        held.write(claim)


def files(keys_root: Path) -> list[Path]:
    return sorted((keys_root / "idempotency").iterdir())


# -- what a key stands for -------------------------------------------------------------------------------


def test_a_key_stands_for_the_job_that_it_was_written_for(keys: IdempotencyKeys, tmp_path: Path) -> None:
    assert not keys.is_used("k")
    assert asyncio.run(claim_of(keys, "k")) is None
    asyncio.run(use(keys, "k", CLAIM))
    assert keys.is_used("k")
    assert asyncio.run(claim_of(IdempotencyKeys(tmp_path / "idempotency"), "k")) == CLAIM
    assert asyncio.run(claim_of(keys, "K")) is None


def test_a_key_that_was_held_for_nothing_leaves_nothing(keys: IdempotencyKeys, tmp_path: Path) -> None:
    async def fail() -> None:
        async with keys.held("k"):
            assert keys.is_used("k")
            raise ImcnetError("no job comes of it")

    with pytest.raises(ImcnetError):
        asyncio.run(fail())
    assert not keys.is_used("k")
    assert files(tmp_path) == []


def test_a_released_key_is_as_new(keys: IdempotencyKeys, tmp_path: Path) -> None:
    async def use_and_release() -> None:
        async with keys.held("k") as held:
            held.write(CLAIM)
            held.release()

    asyncio.run(use_and_release())
    assert files(tmp_path) == []
    assert asyncio.run(claim_of(keys, "k")) is None


def test_a_key_may_come_to_stand_for_another_job(keys: IdempotencyKeys) -> None:
    asyncio.run(use(keys, "k", CLAIM))
    shorter = Claim(job_id="b", fingerprint="c")
    asyncio.run(use(keys, "k", shorter))
    assert asyncio.run(claim_of(keys, "k")) == shorter


@pytest.mark.parametrize("length", [0, 1, 10, -1])
def test_a_torn_claim_counts_as_none(keys: IdempotencyKeys, tmp_path: Path, length: int) -> None:
    asyncio.run(use(keys, "k", CLAIM))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert asyncio.run(claim_of(keys, "k")) is None


def test_keys_never_become_paths(keys: IdempotencyKeys, tmp_path: Path) -> None:
    for key in ("../../outside", "a/b", ".", "x" * 255):
        asyncio.run(use(keys, key, CLAIM))
    assert len(files(tmp_path)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["idempotency"]


# -- one at a time ---------------------------------------------------------------------------------------


def test_a_key_is_held_by_one_task_at_a_time(keys: IdempotencyKeys) -> None:
    holding = 0
    seen: list[Claim | None] = []

    async def hold() -> None:
        nonlocal holding
        async with keys.held("k") as held:
            holding += 1
            assert holding == 1
            seen.append(held.claim)
            await asyncio.sleep(0.01)
            if held.claim is None and len(seen) > 3:  # the first ones fail
                held.write(CLAIM)
            holding -= 1

    async def all_at_once() -> None:
        await asyncio.gather(*(hold() for _ in range(20)))

    asyncio.run(all_at_once())
    assert seen == [*[None] * 4, *[CLAIM] * 16]


def test_other_keys_are_free_meanwhile(keys: IdempotencyKeys) -> None:
    async def hold_two() -> None:
        async with keys.held("k"), asyncio.timeout(20), keys.held("l") as held:
            held.write(CLAIM)

    asyncio.run(hold_two())
    assert asyncio.run(claim_of(keys, "l")) == CLAIM


HOLDER = """
import asyncio, sys
from pathlib import Path
from service.idempotency import Claim, IdempotencyKeys

async def hold():
    async with IdempotencyKeys(Path(sys.argv[1])).held("k") as held:
        held.write(Claim(job_id="its-job", fingerprint="f"))
        print("held", flush=True)
        await asyncio.sleep(600)

asyncio.run(hold())
"""


def test_a_process_that_is_killed_lets_go_of_its_key(keys: IdempotencyKeys, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "idempotency")], stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"

        async def wait_for_it() -> Claim | None:
            waiting = asyncio.create_task(claim_of(keys, "k"))
            done, _ = await asyncio.wait([waiting], timeout=0.5)
            assert not done
            holder.send_signal(signal.SIGKILL)
            async with asyncio.timeout(20):
                return await waiting

        claim = asyncio.run(wait_for_it())
    assert claim is not None
    assert claim.job_id == "its-job"


# -- sweeping --------------------------------------------------------------------------------------------


def test_old_keys_are_swept_unless_they_are_held(keys: IdempotencyKeys, tmp_path: Path) -> None:
    async def sweep_while_one_is_held() -> None:
        for key in ("old", "held", "young"):
            await use(keys, key, CLAIM)
        async with keys.held("held"):
            for path in files(tmp_path):
                os.utime(path, (time.time() - 100, time.time() - 100))
            await use(keys, "young", CLAIM)
            keys.sweep(50)

    asyncio.run(sweep_while_one_is_held())
    assert [key for key in ("old", "held", "young") if keys.is_used(key)] == ["held", "young"]


def test_a_key_that_is_swept_while_somebody_waits_for_it_is_new(keys: IdempotencyKeys) -> None:
    async def race() -> None:
        for _ in range(50):
            await asyncio.gather(use(keys, "k", CLAIM), asyncio.to_thread(keys.sweep, -1))
            async with keys.held("k") as held:
                assert keys.is_used("k")  # whoever holds a key holds the file that others find
                held.write(CLAIM)
            assert await claim_of(keys, "k") == CLAIM

    asyncio.run(race())


# -- the disk, and what clients send ---------------------------------------------------------------------


def test_a_disk_that_is_gone_is_said_so(keys: IdempotencyKeys, tmp_path: Path) -> None:
    (tmp_path / "idempotency").rmdir()
    with pytest.raises(StorageUnavailable):
        asyncio.run(claim_of(keys, "k"))


def test_a_full_disk_is_said_so_and_the_key_stays_free(keys: IdempotencyKeys, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(StorageFull):
            asyncio.run(use(keys, "k", CLAIM))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_a_matter_for_the_operator(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured):
        IdempotencyKeys(tmp_path / "file" / "idempotency").prepare()


@pytest.mark.parametrize("key", ["", "x" * 256, "ä", "a\nb", "a\tb", "\x7f", "\0"])
def test_odd_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_key(key)
    assert refusal.value.code == "bad_request"


@pytest.mark.parametrize("key", ["x", "x" * 255, "8e03978e-40d5-43dd-bc93-6894a57f9324", '"quoted" key ~'])
def test_other_keys_are_taken(key: str) -> None:
    check_key(key)


def test_the_fingerprint_is_of_the_video_and_of_what_the_options_mean() -> None:
    plain = fingerprint_of("a" * 64, JobOptions())
    assert fingerprint_of("a" * 64, JobOptions(threshold=0.5, quality="exact")) == plain
    both = [(ArtifactKind.MASKS, ArtifactKind.OVERLAY), (ArtifactKind.OVERLAY, ArtifactKind.MASKS)]
    assert len({fingerprint_of("a" * 64, JobOptions(artifacts=kinds)) for kinds in both}) == 1
    others = [
        fingerprint_of("b" * 64, JobOptions()),
        fingerprint_of("a" * 64, JobOptions(threshold=0.25)),
        fingerprint_of("a" * 64, JobOptions(max_side=64)),
        fingerprint_of("a" * 64, JobOptions(artifacts=both[0])),
    ]
    assert len({plain, *others}) == 5
