"""Jobs that are interrupted, go on, and come out as if nothing had happened. On a real engine."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest

from service.jobs import ArtifactKind, JobOptions, JobRecord, Outcome, Progress, Quality, utc_now
from service.media import MediaLimits
from tests.service.test_jobs import RECORD
from tests.videos import damage_packets, moving_square, noise, write_video
from worker.decode import VideoReader
from worker.engine_process import EngineProcess, EngineStream
from worker.pipeline import run_job
from worker.settings import WorkerSettings
from worker.spans import SpanDamaged, SpanStore

pytestmark = pytest.mark.processes

FRAMES = 30
SPAN = 8
LIMITS = MediaLimits(max_pixels=10**6, min_side=16, max_duration_seconds=60, max_frames=1000, max_streams=8)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def engine(untrained_weights: Path) -> Iterator[EngineProcess]:
    settings = WorkerSettings(weights=untrained_weights, device="cpu", input_size=32, cpu_threads=1)
    engine = EngineProcess(settings)
    engine.ensure_running()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", moving_square(FRAMES))


class Job:
    """A job of one test, and attempts at it."""

    def __init__(
        self,
        directory: Path,
        engine: EngineProcess,
        video: Path,
        *,
        quality: Quality = "exact",
        span: int = SPAN,
    ) -> None:
        self.directory = directory
        self.spans = directory / "spans-key"
        self.attempts = 0
        self.reports: list[Progress] = []
        self._engine = engine
        self._video = video
        self._length = span
        # Where the untrained network is undecided: masks that are all the same would prove little.
        options = JobOptions(threshold=0.5112, quality=quality, artifacts=tuple(ArtifactKind))
        self._record: JobRecord = RECORD.model_copy(update={"options": options})
        directory.mkdir()

    @property
    def workspace(self) -> Path:
        return self.directory / f"attempt-{self.attempts:04d}"

    def attempt(
        self,
        *,
        at_frame: Callable[[int], None] = lambda frame: None,
        at_end: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Args: at_frame: Called with the number of frames done, after each. at_end: After all."""
        self.attempts += 1
        self.workspace.mkdir()
        self.reports = []

        def report(progress: Progress) -> None:
            self.reports.append(progress)
            if progress.phase == "segmenting":
                at_frame(progress.frames_done)
            else:
                at_end()

        stream = EngineStream(
            socket_path=self._engine.socket,
            engine_pid=self._engine.pid,
            tick=lambda: None,
            stall_seconds=60,
        )
        with VideoReader(self._video, LIMITS, max_corrupt_fraction=0.5) as video:
            return run_job(
                self._record,
                video,
                self.workspace,
                SpanStore(self.spans, self._length),
                stream=stream,
                model=self._engine.ready.model,
                prepared=stream.prepare(self._record.options.quality, timeout_seconds=60),
                margin_frames=self._engine.ready.margin_frames,
                attempt=self.attempts,
                started_at=utc_now(),
                report=report,
            )

    def interrupted(self, *, after: int) -> None:
        """An attempt that ends as soon as this many frames are done."""

        def interrupt(frame: int) -> None:
            if frame >= after:
                raise Interrupted

        with pytest.raises(Interrupted):
            self.attempt(at_frame=interrupt)

    def finished(self) -> list[str]:
        return sorted(path.name for path in self.spans.iterdir()) if self.spans.exists() else []

    def digests(self) -> dict[str, str]:
        artifacts = sorted((self.workspace / "artifacts").iterdir())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in artifacts}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, engine: EngineProcess, video: Path
) -> dict[str, str]:
    job = Job(tmp_path_factory.mktemp("undisturbed") / "job", engine, video)
    outcome = job.attempt()
    assert outcome.frames == FRAMES
    assert job.finished() == ["000000", "000001", "000002", "000003"]
    digests = job.digests()
    assert {artifact.name: artifact.sha256 for artifact in outcome.artifacts} == digests
    return digests


@pytest.mark.parametrize("after", [1, 7, 8, 9, 16, 23, 24, 29, 30])
def test_a_job_that_goes_on_gives_the_bytes_of_one_that_was_never_interrupted(
    tmp_path: Path, engine: EngineProcess, video: Path, undisturbed: dict[str, str], after: int
) -> None:
    job = Job(tmp_path / "job", engine, video)
    job.interrupted(after=after)
    assert len(job.finished()) == after // SPAN
    outcome = job.attempt()
    assert job.digests() == undisturbed
    assert job.reports[0].frames_done == after // SPAN * SPAN + 1
    assert (outcome.attempt, outcome.frames) == (2, FRAMES)


def test_a_job_that_is_interrupted_in_every_span_comes_to_its_end(
    tmp_path: Path, engine: EngineProcess, video: Path, undisturbed: dict[str, str]
) -> None:
    job = Job(tmp_path / "job", engine, video)
    for after in (10, 18, 26):
        job.interrupted(after=after)
    job.attempt()
    assert job.digests() == undisturbed


@pytest.mark.parametrize("span", [1, 15, 30, 1000])
def test_the_length_of_the_spans_does_not_show_in_the_masks(
    tmp_path: Path, engine: EngineProcess, video: Path, undisturbed: dict[str, str], span: int
) -> None:
    job = Job(tmp_path / "job", engine, video, span=span)
    job.attempt()
    assert job.digests()["masks.zip"] == undisturbed["masks.zip"]


@pytest.mark.parametrize("span", [SPAN, 15, 30, 1000])
def test_an_attempt_at_a_job_whose_spans_are_all_finished_only_makes_the_artifacts(
    tmp_path: Path, engine: EngineProcess, video: Path, span: int
) -> None:
    job = Job(tmp_path / "job", engine, video, span=span)
    first = job.attempt()
    digests = job.digests()
    second = job.attempt()
    assert job.digests() == digests
    assert [progress.phase for progress in job.reports] == ["publishing"]
    assert first.timings is not None
    assert second.timings is not None
    assert second.timings.inference_s == first.timings.inference_s > 0


def test_multi_scale_goes_on_as_well(tmp_path: Path, engine: EngineProcess, video: Path) -> None:
    whole = Job(tmp_path / "whole", engine, video, quality="multi_scale")
    whole.attempt()
    parts = Job(tmp_path / "parts", engine, video, quality="multi_scale")
    parts.interrupted(after=20)
    parts.attempt()
    assert parts.digests() == whole.digests()


def test_a_video_of_a_varying_rate_and_an_odd_size_goes_on_as_well(
    tmp_path: Path, engine: EngineProcess
) -> None:
    pts = [index + index // 5 * 10 for index in range(20)]
    images = moving_square(20, width=65, height=47)
    video = write_video(tmp_path / "v.mkv", images, pts=pts, pix_fmt="yuv444p")
    whole = Job(tmp_path / "whole", engine, video)
    whole.attempt()
    parts = Job(tmp_path / "parts", engine, video)
    parts.interrupted(after=9)
    parts.interrupted(after=17)
    parts.attempt()
    assert parts.digests() == whole.digests()
    with av.open(str(parts.workspace / "artifacts" / "overlay.mp4")) as container:
        shown = list(container.decode(video=0))
    assert [frame.time for frame in shown] == pytest.approx([each / 25 for each in pts], abs=1e-3)
    assert {(frame.height, frame.width) for frame in shown} == {(46, 64)}


def test_what_is_wrong_with_a_video_is_told_by_a_resumed_attempt_too(
    tmp_path: Path, engine: EngineProcess
) -> None:
    damaged = damage_packets(
        write_video(tmp_path / "damaged.mp4", noise(30), codec_options={"g": "5", "bf": "0"}), [3, 4]
    )
    whole = Job(tmp_path / "whole", engine, damaged)
    expected = whole.attempt()
    parts = Job(tmp_path / "parts", engine, damaged)
    parts.interrupted(after=20)
    outcome = parts.attempt()
    assert "damaged_frames" in {warning.code for warning in expected.warnings}
    assert (outcome.warnings, outcome.frames) == (expected.warnings, expected.frames)
    assert parts.digests() == whole.digests()


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (flip_a_byte, "masks.bin"),
        (flip_a_byte, "overlay.nut"),
        (cut_short, "masks.bin"),
        (cut_short, "span.json"),
        (Path.unlink, "masks.bin"),
        (Path.unlink, "overlay.nut"),
        (Path.unlink, "span.json"),
    ],
)
def test_a_span_that_was_damaged_is_made_anew(
    tmp_path: Path,
    engine: EngineProcess,
    video: Path,
    undisturbed: dict[str, str],
    harm: Callable[[Path], None],
    name: str,
) -> None:
    job = Job(tmp_path / "job", engine, video)
    job.interrupted(after=25)
    harm(job.spans / "000001" / name)
    job.attempt()
    assert job.reports[0].frames_done == SPAN + 1
    assert job.digests() == undisturbed


@pytest.mark.parametrize("harm", [flip_a_byte, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["masks.bin", "overlay.nut"])
def test_a_span_that_is_damaged_while_the_attempt_runs_ends_it(
    tmp_path: Path,
    engine: EngineProcess,
    video: Path,
    undisturbed: dict[str, str],
    harm: Callable[[Path], None],
    name: str,
) -> None:
    job = Job(tmp_path / "job", engine, video)
    with pytest.raises(SpanDamaged):
        job.attempt(at_end=lambda: harm(job.spans / "000000" / name))
    assert job.finished() == ["000001", "000002", "000003"]
    job.attempt()
    assert job.digests() == undisturbed


@pytest.mark.parametrize("after", [1, SPAN, SPAN + 2, FRAMES])
def test_an_attempt_whose_workspace_was_taken_away_publishes_nothing_more(
    tmp_path: Path, engine: EngineProcess, video: Path, after: int
) -> None:
    job = Job(tmp_path / "job", engine, video)

    def take_away(frame: int) -> None:
        if frame == after:
            job.workspace.rename(tmp_path / "ended")

    with pytest.raises(FileNotFoundError):
        job.attempt(at_frame=take_away)
    assert len(job.finished()) == after // SPAN
    assert not (tmp_path / "ended" / "artifacts").exists()
    assert not job.workspace.exists()


def test_an_attempt_whose_workspace_is_taken_away_at_its_end_makes_no_artifacts(
    tmp_path: Path, engine: EngineProcess, video: Path
) -> None:
    job = Job(tmp_path / "job", engine, video)

    def take_away() -> None:
        job.workspace.rename(tmp_path / "ended")

    with pytest.raises(FileNotFoundError):
        job.attempt(at_end=take_away)
    assert not (tmp_path / "ended" / "artifacts").exists()
    assert not job.workspace.exists()


def test_an_attempt_whose_workspace_was_taken_away_leaves_not_even_an_empty_directory(tmp_path: Path) -> None:
    store = SpanStore(tmp_path / "spans-key", SPAN)
    with pytest.raises(FileNotFoundError):
        store.publish(tmp_path / "ended" / "span-000000", 0)
    assert list(tmp_path.iterdir()) == []


def test_two_attempts_that_finish_the_same_span_leave_one(
    tmp_path: Path, engine: EngineProcess, video: Path, undisturbed: dict[str, str]
) -> None:
    job, other = Job(tmp_path / "job", engine, video), Job(tmp_path / "other", engine, video)
    other.attempt()

    def be_slower(frame: int) -> None:
        if frame == 12:
            (other.spans / "000001").rename(job.spans / "000001")

    job.attempt(at_frame=be_slower)
    assert job.digests() == undisturbed
    assert {path.name for path in job.workspace.iterdir()} == {"artifacts"}


def test_an_error_leaves_no_file_open(tmp_path: Path, engine: EngineProcess, video: Path) -> None:
    job = Job(tmp_path / "job", engine, video)
    job.interrupted(after=3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        job.interrupted(after=3)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
