import asyncio
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from service.errors import UnusableVideo
from service.jobs import VideoInfo
from service.media import MediaLimits
from service.probe import probe_video
from tests.videos import CLIPS, Clip, moving_square, noise, write_video

GIB = 2**30


def probe(
    path: Path, *, timeout_seconds: float = 15, memory_bytes: int = 3 * GIB // 2, **limits: int
) -> VideoInfo:
    return asyncio.run(
        probe_video(
            path,
            limits=MediaLimits(**limits),
            timeout_seconds=timeout_seconds,
            memory_bytes=memory_bytes,
        )
    )


def refusal(
    path: Path, *, timeout_seconds: float = 15, memory_bytes: int = 3 * GIB // 2, **limits: int
) -> UnusableVideo:
    with pytest.raises(UnusableVideo) as caught:
        probe(path, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes, **limits)
    assert str(path.parent) not in caught.value.detail
    return caught.value


def no_probe_runs() -> bool:
    """A Redis of the tests may be another child of this process."""
    return not [c for c in psutil.Process().children(recursive=True) if "service.probe" in c.cmdline()]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "upload", moving_square(30), fps=10, container_format="mp4")


def test_a_video_is_described(video: Path) -> None:
    assert probe(video) == VideoInfo(
        width=64,
        height=48,
        rotation=0,
        fps=10.0,
        frames=30,
        duration_s=3.0,
        container="mov,mp4,m4a,3gp,3g2,mj2",
        codec="h264",
    )
    assert no_probe_runs()


def test_the_size_is_told_as_displayed(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "v.mov", moving_square(3), rotation=90))
    assert (info.width, info.height, info.rotation) == (48, 64, 90)


def test_frames_are_estimated_where_the_container_does_not_count(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "v.mkv", moving_square(30), fps=10))
    assert (info.frames, info.duration_s, info.container) == (30, 3.0, "matroska,webm")


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    live = write_video(tmp_path / "v.webm", moving_square(5), codec="libvpx", container_options={"live": "1"})
    info = probe(live)
    assert (info.frames, info.duration_s) == (None, None)


def test_a_damaged_beginning_does_not_hide_the_rest(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.ts", noise(40), codec_options={"g": "10"})
    data = video.read_bytes()
    video.write_bytes(data[len(data) // 10 // 188 * 188 :])
    assert (probe(video).width, probe(video).height) == (64, 48)


@pytest.mark.data
@pytest.mark.parametrize(("name", "clip"), CLIPS.items(), ids=CLIPS)
def test_a_real_clip_is_described(data_dir: Path, name: str, clip: Clip) -> None:
    info = probe(data_dir / "clips" / name)
    assert (info.width, info.height, info.rotation) == (clip.width, clip.height, clip.rotation)
    assert (info.frames, info.codec) == (clip.announced, clip.codec)


@pytest.mark.data
def test_a_picture_of_one_pixel_is_refused(data_dir: Path) -> None:
    assert refusal(data_dir / "clips" / "bitmap.mp4").code == "dimensions_below_limit"


def test_what_open_video_refuses_is_refused_under_its_code(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_text("no video at all")
    assert refusal(path).code == "not_a_video"
    path.write_bytes(b"")
    assert refusal(path).code == "empty_file"


def test_a_stream_without_a_decodable_frame_is_refused(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", noise(10), container_options={"movflags": "+faststart"})
    data = video.read_bytes()
    video.write_bytes(data[: data.index(b"mdat") + 4])
    assert refusal(video).code == "undecodable_stream"


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_frames": 29}, "too_many_frames"),
        ({"max_duration_seconds": 2}, "duration_exceeds_limit"),
        ({"max_pixels": 64 * 48 - 1}, "dimensions_exceed_limit"),
        ({"min_side": 49}, "dimensions_below_limit"),
        ({"max_frames": 30, "max_duration_seconds": 3, "max_pixels": 64 * 48, "min_side": 48}, None),
    ],
)
def test_claims_are_held_against_the_limits(video: Path, limits: dict[str, int], code: str | None) -> None:
    if code is None:
        probe(video, **limits)
    else:
        assert refusal(video, **limits).code == code


def test_a_probe_that_takes_too_long_is_killed(video: Path) -> None:
    assert refusal(video, timeout_seconds=0.02).code == "resource_limit"
    assert no_probe_runs()


def test_a_probe_that_wants_too_much_memory_ends(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_square(2, width=3840, height=2160))
    assert probe(video).width == 3840
    assert refusal(video, memory_bytes=32 * 2**20).code == "resource_limit"


def test_cancelling_leaves_no_child_behind(video: Path) -> None:
    async def cancel_after(delay_seconds: float) -> None:
        task = asyncio.create_task(
            probe_video(video, limits=MediaLimits(), timeout_seconds=15, memory_bytes=GIB)
        )
        await asyncio.sleep(delay_seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for delay_seconds in (0.0, 0.01, 0.05):
        asyncio.run(cancel_after(delay_seconds))
        assert no_probe_runs()


def test_probes_run_beside_each_other_and_the_loop(video: Path) -> None:
    async def two() -> float:
        limits = MediaLimits()
        probes = [
            asyncio.create_task(probe_video(video, limits=limits, timeout_seconds=15, memory_bytes=GIB))
            for _ in range(2)
        ]
        longest = 0.0
        while not all(task.done() for task in probes):
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)
        assert [task.result().frames for task in probes] == [30, 30]
        return longest

    assert asyncio.run(two()) < 5


def test_the_working_directory_does_not_matter(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert probe(Path("upload")).frames == 30


def test_neither_the_probe_nor_the_decoder_imports_torch() -> None:
    code = "import service.probe, worker.decode, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
