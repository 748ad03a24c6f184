"""Each input of the corpus gets its answer, at upload from a real API and later from the decoder."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import UnusableVideo
from service.media import MediaLimits
from tests.hostile.api import MIB, Api, private_api
from tests.hostile.corpus import MADE, Entry, real_clips
from tests.videos import CLIPS
from worker.decode import VideoReader

pytestmark = pytest.mark.processes

GROWTH_BYTES = 50 * MIB
PROBE_BYTES = 1600 * 10**6
TELLTALE = re.compile(r"Traceback|/tmp|/data|\.py\b|ffmpeg|av\.|\d+\.\d+\.\d+|Lavf", re.IGNORECASE)
WITH_A_WORKER = ("mp4 cut in half", "damaged by 2 %", "rotated by 90°")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One for all of the corpus: what an input leaves behind, the next ones meet."""
    with private_api(tmp_path_factory.mktemp("api")) as api:
        yield api


@pytest.fixture(scope="module")
def resident_bytes_before(api: Api, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of the API, after its first upload."""
    video = tmp_path_factory.mktemp("first") / "upload"
    MADE[-1].build(video)
    assert api.post(video).status == 202
    return api.resident_bytes


def check(entry: Entry, video: Path, api: Api, resident_bytes_before: int) -> None:
    entry.build(video)
    answer = api.post(video, filename=entry.filename)
    assert (answer.status, answer.code) == (entry.refused or (202, None))
    if entry.refused:
        assert not TELLTALE.search(answer.body)
    assert answer.probe_bytes < PROBE_BYTES
    assert api.is_alive()
    assert api.resident_bytes - resident_bytes_before < GROWTH_BYTES
    if entry.fails is not None:
        with pytest.raises(UnusableVideo) as caught:
            read(video)
        assert caught.value.code == entry.fails
        assert not TELLTALE.search(caught.value.detail)
    if entry.accepted:
        frames, warnings = read(video)
        assert frames == (entry.frames or frames) > 0
        assert warnings == entry.warnings


def read(video: Path) -> tuple[int, tuple[str, ...]]:
    with VideoReader(video, MediaLimits(), max_corrupt_fraction=0.05) as reader:
        for _ in reader:
            pass
    return reader.frames, tuple(warning.code for warning in reader.warnings)


@pytest.mark.parametrize("entry", MADE, ids=lambda entry: entry.name)
def test_an_input_gets_its_answer(tmp_path: Path, api: Api, resident_bytes_before: int, entry: Entry) -> None:
    check(entry, tmp_path / "upload", api, resident_bytes_before)


@pytest.mark.data
@pytest.mark.parametrize("name", [*CLIPS, "bitmap.mp4"])
def test_a_real_clip_gets_its_answer(
    tmp_path: Path, data_dir: Path, api: Api, resident_bytes_before: int, name: str
) -> None:
    (entry,) = (entry for entry in real_clips(data_dir / "clips") if entry.name == name)
    check(entry, tmp_path / "upload", api, resident_bytes_before)


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory, untrained_weights: Path) -> Iterator[Api]:
    """An API of its own, with a worker: the other one's jobs wait for ever."""
    with private_api(tmp_path_factory.mktemp("working")) as api:
        api.stack.start_worker(weights=untrained_weights, input_size=64, cpu_threads=1)
        yield api


@pytest.mark.parametrize(
    "entry", [entry for entry in MADE if entry.name in WITH_A_WORKER], ids=lambda entry: entry.name
)
def test_a_worker_gives_its_answer(tmp_path: Path, working: Api, entry: Entry) -> None:
    entry.build(tmp_path / "upload")
    answer = working.post(tmp_path / "upload")
    assert answer.job_id is not None
    job = working.stack.ended(answer.job_id)
    assert job["attempt"] == 1
    if entry.fails is not None:
        assert (job["status"], job["error"]["code"]) == ("failed", entry.fails)
        assert not TELLTALE.search(job["error"]["detail"])
    else:
        assert job["status"] == "succeeded", job
        assert {*entry.warnings} <= {warning["code"] for warning in job["warnings"]}
