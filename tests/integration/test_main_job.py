"""A video goes in over HTTP, a mask archive comes out: real Redis, real worker, real files."""

import contextlib
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from service.jobs import JobStatus
from tests.integration.conftest import Stack, eventually
from tests.videos import moving_square, write_video

pytestmark = pytest.mark.processes


def decoded_sizes(path: Path) -> list[tuple[int, int]]:
    """Height and width of every frame, as displayed, by a plain decode."""
    with av.open(str(path)) as container:
        sizes = []
        for frame in container.decode(video=0):
            turned = frame.rotation % 180 != 0
            sizes.append((frame.width, frame.height) if turned else (frame.height, frame.width))
        return sizes


def manifest(archive: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(archive)) as masks:
        content: dict[str, Any] = json.loads(masks.read("manifest.json"))
        return content


def mask_sizes(archive: bytes) -> list[tuple[int, int]]:
    with zipfile.ZipFile(io.BytesIO(archive)) as masks:
        assert masks.testzip() is None
        sizes = []
        for ordinal, entry in enumerate(manifest(archive)["frames"]):
            assert entry["file"] == f"masks/{ordinal:08d}.png"
            mask = np.asarray(Image.open(io.BytesIO(masks.read(entry["file"]))).convert("L"))
            assert set(np.unique(mask)) <= {0, 255}
            sizes.append(mask.shape)
        assert len(masks.namelist()) == len(sizes) + 1
        return sizes


def test_a_posted_video_comes_back_as_masks_and_overlay(stack: Stack, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", moving_square(12, height=48, width=86))
    stack.start_api()
    stack.start_worker()
    posted = stack.post(video, artifacts=["masks", "overlay"], threshold=0.4)
    job = stack.ended(posted["id"])

    assert job["status"] == "succeeded", job
    assert job["input"]["frames"] == 12
    assert (job["progress"]["phase"], job["progress"]["percent"]) == ("done", 100.0)
    assert "untrained_weights" in {warning["code"] for warning in job["warnings"]}
    assert job["model"]["backbone"] == "resnet18"
    assert set(job["timings"]) == {"queue_s", "decode_s", "inference_s", "encode_s"}
    assert mask_sizes(stack.download(job["id"])) == [(48, 86)] * 12
    overlay = tmp_path / "overlay.mp4"
    overlay.write_bytes(stack.download(job["id"], "overlay.mp4"))
    assert decoded_sizes(overlay) == [(48, 86)] * 12


def test_equal_videos_give_equal_archives_and_the_model_is_loaded_once(stack: Stack, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", moving_square(7))
    stack.start_api()
    stack.start_worker()
    engine_before = stack.workers()[0]["engine_pid"]
    archives = {stack.download(stack.ended(stack.post(video)["id"])["id"]) for _ in range(3)}
    assert len(archives) == 1
    assert stack.workers()[0]["engine_pid"] == engine_before


def test_a_multi_scale_job_leaves_a_mask_a_frame_and_says_what_it_was(stack: Stack, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", moving_square(7))
    stack.start_api()
    stack.start_worker()
    exact, multi_scale = (
        stack.ended(stack.post(video, quality=quality)["id"]) for quality in ("exact", "multi_scale")
    )
    assert (multi_scale["status"], multi_scale["options"]["quality"]) == ("succeeded", "multi_scale")
    archives = [stack.download(job["id"]) for job in (exact, multi_scale)]
    assert mask_sizes(archives[1]) == [(48, 64)] * 7
    assert [manifest(archive)["options"]["quality"] for archive in archives] == ["exact", "multi_scale"]
    assert multi_scale["timings"]["inference_s"] > 3 * exact["timings"]["inference_s"]


def test_a_fast_job_whose_masks_nothing_vouches_for_is_exact_and_says_so(
    stack: Stack, tmp_path: Path
) -> None:
    video = write_video(tmp_path / "clip.mp4", moving_square(7))
    stack.start_api()
    stack.start_worker()
    exact, fast = (stack.ended(stack.post(video, quality=quality)["id"]) for quality in ("exact", "fast"))
    assert "fast_unavailable" in {warning["code"] for warning in fast["warnings"]}
    assert "fast_unavailable" not in {warning["code"] for warning in exact["warnings"]}
    expected = {"name": "torch-float32", "device": "cpu", "quality": "exact"}
    assert exact["engine"] == fast["engine"] == expected
    told = manifest(stack.download(fast["id"]))
    assert (told["engine"], told["options"]["quality"]) == (fast["engine"], "fast")


def test_masks_can_be_smaller_than_the_video(stack: Stack, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", moving_square(3, height=96, width=128))
    stack.start_api()
    stack.start_worker()
    job = stack.ended(stack.post(video, max_side=64)["id"])
    assert mask_sizes(stack.download(job["id"])) == [(48, 64)] * 3


def test_a_job_whose_masks_are_all_empty_succeeds_and_says_so(stack: Stack, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", moving_square(3))
    stack.start_api()
    stack.start_worker()
    job = stack.ended(stack.post(video, threshold=0.999999)["id"])
    assert job["status"] == "succeeded"
    assert "empty_masks" in {warning["code"] for warning in job["warnings"]}


def test_a_video_that_is_cut_in_half_fails_and_says_why(stack: Stack, tmp_path: Path) -> None:
    whole = write_video(
        tmp_path / "clip.mp4", moving_square(100), container_options={"movflags": "faststart"}
    )
    half = tmp_path / "half.mp4"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    stack.start_api()
    stack.start_worker()
    job = stack.ended(stack.post(half)["id"])
    assert job["status"] == "failed"
    assert job["error"]["code"] == "truncated_input"
    assert job["artifacts"] == []
    with stack.client as client:
        assert client.get(f"/jobs/{job['id']}/artifacts/masks.zip").status_code == 409


def test_finished_jobs_expire_with_all_their_files(stack: Stack, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", moving_square(3))
    stack.start_api(retention_seconds=2, sweep_interval_seconds=0.2)
    stack.start_worker()
    job_id = stack.post(video)["id"]

    def gone() -> bool:
        with stack.client as client:
            return client.get(f"/jobs/{job_id}").status_code == 410

    eventually(gone, within_seconds=60, what="the job expires")
    files = {path.relative_to(stack.data_dir) for path in stack.data_dir.rglob("*") if path.is_file()}
    assert files == {Path("identity"), Path("tombstones") / job_id}


@pytest.mark.data
@pytest.mark.timeout(600)
def test_real_clips_of_many_kinds_get_a_mask_for_every_decoded_frame(stack: Stack, data_dir: Path) -> None:
    clips = [data_dir / "davis16" / "val" / "blackswan.mp4"] + [
        data_dir / "clips" / name
        for name in (
            "video_0.mov",
            "video_90.mov",
            "video_180.mov",
            "video_270.mov",
            "fire2.mp4",
            "h265_video.mp4",
            "av1_video.mkv",
            "h264_10bits.mp4",
            "h265_10bits.mp4",
        )
    ]
    stack.start_api()
    stack.start_worker()
    jobs = {clip: stack.post(clip)["id"] for clip in clips}
    for clip, job_id in jobs.items():
        job = stack.ended(job_id, within_seconds=400)
        assert job["status"] == JobStatus.SUCCEEDED, (clip.name, job["error"])
        sizes = decoded_sizes(clip)
        assert mask_sizes(stack.download(job_id)) == sizes, clip.name
        assert (job["input"]["height"], job["input"]["width"]) == sizes[0], clip.name
        assert job["input"]["frames"] == len(sizes), clip.name


def test_the_workers_memory_does_not_grow_with_the_length_of_the_video(stack: Stack, tmp_path: Path) -> None:
    short = write_video(tmp_path / "short.mp4", moving_square(90))
    long = write_video(tmp_path / "long.mp4", moving_square(900))
    stack.start_api()
    worker = psutil.Process(stack.start_worker().pid)
    stack.ended(stack.post(short)["id"])  # lets the engine reach its working size
    peaks = [peak_memory(worker, stack, stack.post(video)["id"]) for video in (short, long)]
    assert peaks[1] <= 1.1 * peaks[0], peaks


def peak_memory(worker: psutil.Process, stack: Stack, job_id: str) -> int:
    """Bytes that worker, engine and horse hold together at most until the job has ended."""
    peak = 0
    while stack.job(job_id)["status"] in ("queued", "running"):
        resident = 0
        for process in (worker, *worker.children()):
            with contextlib.suppress(psutil.NoSuchProcess):
                resident += process.memory_info().rss
        peak = max(peak, resident)
        time.sleep(0.05)
    return peak
