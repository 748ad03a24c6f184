"""Seeded mutations of real videos: whatever comes of them, it is an answer.

``pytest tests/hostile/test_mutations.py --mutations 2000`` tries as many as that.
"""

import asyncio
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


def try_mutations(originals: dict[str, bytes], directory: Path, config: pytest.Config, share: float) -> None:
    count = round(share * config.getoption("mutations"))
    tally = asyncio.run(try_all(originals, directory, config.getoption("mutations_seed"), count))
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    sys.stdout.write(f"{count} mutations: largest child {peak_bytes / 2**20:.0f} MiB, {tally}\n")
    assert tally.answers.total() == count


def test_mutated_videos_get_an_answer(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    try_mutations(write_originals(tmp_path), tmp_path, pytestconfig, 0.75)


@pytest.mark.data
def test_mutated_clips_get_an_answer(tmp_path: Path, data_dir: Path, pytestconfig: pytest.Config) -> None:
    originals = {name: (data_dir / "clips" / name).read_bytes() for name in DATA_CLIPS}
    try_mutations(originals, tmp_path, pytestconfig, 0.25)
