"""Seeded mutations of real videos: whatever comes of them, it is an answer.

``pytest tests/hostile/test_mutations.py --mutations 2000`` tries as many as that.
"""

import asyncio
import logging
import os
import random
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.errors import PROBLEMS, UnusableVideo
from service.media import MediaLimits
from service.probe import probe_video
from tests.conftest import REPOSITORY
from tests.hostile.conftest import DEFAULT_MUTATIONS
from tests.hostile.mutations import mutated, write_originals

pytestmark = pytest.mark.mutations

PROBE_SECONDS, PROBE_BYTES = 15, 3 * 2**29
READING_SECONDS, READING_BYTES = 60, 2**32
DATA_CLIPS = ("h264_10bits.mp4", "h265_video.mp4", "av1_video.mkv", "video_90.mov", "transparent.webm")


@dataclass
class Tally:
    """What came of the mutations so far."""

    answers: Counter[str] = field(default_factory=Counter)
    slowest_probe: float = 0.0
    slowest_reading: float = 0.0

    def __str__(self) -> str:
        answers = ", ".join(f"{answer} {count}" for answer, count in self.answers.most_common())
        return f"slowest probe {self.slowest_probe:.2f} s, reading {self.slowest_reading:.2f} s; {answers}"


async def try_out(video: Path, tally: Tally) -> None:
    began = time.monotonic()
    try:
        # Killed only past its limit, which it therefore has to keep by itself.
        await probe_video(
            video, limits=MediaLimits(), timeout_seconds=2 * PROBE_SECONDS, memory_bytes=PROBE_BYTES
        )
        answer = "accepted"
    except UnusableVideo as error:
        answer = check(error.code, error.detail, video)
    seconds = time.monotonic() - began
    tally.slowest_probe = max(tally.slowest_probe, seconds)
    assert seconds < PROBE_SECONDS
    if answer == "accepted":
        began = time.monotonic()
        answer = f"accepted, then {await read(video)}"
        tally.slowest_reading = max(tally.slowest_reading, time.monotonic() - began)
    tally.answers[answer] += 1


async def read(video: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.hostile.reading", str(video), str(READING_BYTES)),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(READING_SECONDS):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, (process.returncode, errors.decode())
    code, _, detail = output.decode().partition("\n")
    return check(code, detail, video) if code else "read"


def check(code: str, detail: str, video: Path) -> str:
    assert code in PROBLEMS
    assert str(video.parent) not in detail
    assert video.name not in detail
    return code


async def try_all(originals: dict[str, bytes], directory: Path, seed: int, count: int) -> Tally:
    """As many at a time as there are cores. Raises: AssertionError: The first that got no answer."""
    tally, turns = Tally(), asyncio.Semaphore(os.cpu_count() or 1)

    async def one(number: int) -> None:
        async with turns:
            name = sorted(originals)[number % len(originals)]
            video = directory / f"mutant-{number}"
            video.write_bytes(mutated(originals[name], random.Random(f"{seed} {name} {number}")))
            try:
                await try_out(video, tally)
            except BaseException as error:
                error.add_note(f"{name}, mutation {number} of seed {seed}")
                raise
            video.unlink()

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
    return tally


@dataclass(frozen=True)
class Trial:
    """A share of the mutations that were asked for."""

    directory: Path
    config: pytest.Config
    log: pytest.LogCaptureFixture

    def try_mutations(self, originals: dict[str, bytes], share: float) -> None:
        count = round(share * self.config.getoption("mutations", DEFAULT_MUTATIONS))
        seed = self.config.getoption("mutations_seed", 1)
        before = _peak_of_children()
        tally = asyncio.run(try_all(originals, self.directory, seed, count))
        peak_bytes = _peak_of_children()
        sys.stdout.write(f"{count} mutations: largest child {peak_bytes / 2**20:.0f} MiB, {tally}\n")
        assert tally.answers.total() == count
        assert peak_bytes < PROBE_BYTES or peak_bytes == before  # or of another test's child
        assert not self.log.messages  # where a probe that died without a word would be told of


def _peak_of_children() -> int:
    """Resident bytes of the largest child that this process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


@pytest.fixture
def trial(tmp_path: Path, pytestconfig: pytest.Config, caplog: pytest.LogCaptureFixture) -> Trial:
    caplog.set_level(logging.WARNING, logger="service")
    return Trial(tmp_path, pytestconfig, caplog)


def test_mutated_videos_get_an_answer(tmp_path: Path, trial: Trial) -> None:
    trial.try_mutations(write_originals(tmp_path), 0.75)


@pytest.mark.data
def test_mutated_clips_get_an_answer(data_dir: Path, trial: Trial) -> None:
    trial.try_mutations({name: (data_dir / "clips" / name).read_bytes() for name in DATA_CLIPS}, 0.25)
