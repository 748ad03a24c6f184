import hashlib
import io
import json
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from service.jobs import EngineInfo, JobOptions, ModelInfo
from worker.artifacts import OverlaySegment, tint, write_archive, write_overlay
from worker.decode import VideoFrame
from worker.png import encode_mask
from worker.protocol import Mask

ENGINE = EngineInfo(name="torch-float32", device="cpu", quality="exact")
MODEL = ModelInfo(name="m", backbone="resnet18", weights_sha256="0" * 64, trained=True)


def frames(count: int, *, height: int = 33, width: int = 47) -> list[tuple[VideoFrame, Mask]]:
    random = np.random.default_rng(0)
    return [
        (
            VideoFrame(random.integers(0, 256, (height, width, 3), np.uint8), 512 * i, i / 25),
            random.random((height, width)) < 0.5,
        )
        for i in range(count)
    ]


def archive(path: Path, content: list[tuple[VideoFrame, Mask]]) -> Path:
    artifact = write_archive(
        path,
        [(frame.pts, frame.time_seconds, encode_mask(mask)) for frame, mask in content],
        size=(33, 47),
        options=JobOptions(quality="fast"),
        model=MODEL,
        engine=ENGINE,
        fps=25.0,
    )
    assert (artifact.name, artifact.bytes) == (path.name, path.stat().st_size)
    assert artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return path


def overlay(directory: Path, *parts: list[tuple[VideoFrame, Mask]]) -> Path:
    """An overlay that is made in parts."""
    segments, last_pts = [], -1
    for index, part in enumerate(parts):
        with OverlaySegment(directory / f"{index}.nut", fps=25.0, last_pts=last_pts) as segment:
            for frame, mask in part:
                segment.add(frame, mask)
        segments.append(segment.path)
        last_pts = segment.last_pts
    write_overlay(directory / "overlay.mp4", segments)
    return directory / "overlay.mp4"


def test_the_archive_holds_every_mask_and_a_manifest_of_the_content_alone(tmp_path: Path) -> None:
    content = frames(3)
    with zipfile.ZipFile(archive(tmp_path / "masks.zip", content)) as opened:
        assert opened.namelist() == [*(f"masks/{i:08d}.png" for i in range(3)), "manifest.json"]
        assert {entry.compress_type for entry in opened.infolist()} == {zipfile.ZIP_STORED}
        manifest = json.loads(opened.read("manifest.json"))
        last = np.asarray(Image.open(io.BytesIO(opened.read("masks/00000002.png"))))
    assert np.array_equal(last, content[2][1])
    assert (manifest["height"], manifest["width"], manifest["fps"]) == (33, 47, 25.0)
    assert manifest["frames"][1] == {"file": "masks/00000001.png", "pts": 512, "time_s": 0.04}
    assert manifest["options"] == {"threshold": 0.5, "max_side": None, "quality": "fast"}
    assert manifest["engine"] == {"name": "torch-float32", "device": "cpu", "quality": "exact"}
    assert manifest["model"] == MODEL.model_dump()


def test_equal_masks_give_equal_bytes(tmp_path: Path) -> None:
    first = archive(tmp_path / "a.zip", frames(3)).read_bytes()
    assert archive(tmp_path / "b.zip", frames(3)).read_bytes() == first


def test_the_overlay_shows_every_frame_at_its_time(tmp_path: Path) -> None:
    content = frames(7)
    # Variable rate, a time that stands still, and one that runs back: the overlay moves forward all the same.
    times = [0.0, 0.5, 0.5, 2.0, 1.0, 1.5, 2.5]
    content = [(VideoFrame(f.image, None, t), m) for (f, m), t in zip(content, times, strict=True)]
    path = overlay(tmp_path, content[:2], content[2:4], content[4:])
    with av.open(str(path)) as container:
        shown = list(container.decode(video=0))
    assert [(frame.height, frame.width) for frame in shown] == [(32, 46)] * 7  # H.264 has even sizes only
    assert [frame.time for frame in shown] == pytest.approx([0.0, 0.5, 0.54, 2.0, 2.04, 2.08, 2.5])


def test_the_overlay_has_the_masks_size(tmp_path: Path) -> None:
    ((frame, _),) = frames(1, height=96, width=64)
    path = overlay(tmp_path, [(frame, np.ones((48, 32), np.bool_))] * 2)
    with av.open(str(path)) as container:
        assert {(f.height, f.width) for f in container.decode(video=0)} == {(48, 32)}


def test_tinting_changes_the_foreground_only() -> None:
    ((frame, mask),) = frames(1)
    tinted = tint(frame.image, mask)
    assert np.array_equal(tinted[~mask], frame.image[~mask])
    assert not np.array_equal(tinted[mask], frame.image[mask])


def test_the_parts_of_an_overlay_join_to_a_video_that_plays(tmp_path: Path) -> None:
    content = frames(30, height=48, width=64)
    path = overlay(tmp_path, content[:8], content[8:16], content[16:24], content[24:])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets]
        assert all(packets[index].is_keyframe for index in (0, 8, 16, 24))
    with av.open(str(path)) as container:
        shown = list(container.decode(video=0))
        assert container.duration == pytest.approx(30 / 25 * av.time_base, rel=0.05)
    assert [frame.time for frame in shown] == pytest.approx([index / 25 for index in range(30)])
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # it starts to play before it is there in full


def test_an_overlay_that_is_left_by_an_error_lets_the_error_through(tmp_path: Path) -> None:
    ((frame, _),) = frames(1)
    with (
        pytest.raises(ValueError, match="unpack"),
        OverlaySegment(tmp_path / "overlay.nut", fps=None, last_pts=-1) as segment,
    ):
        segment.add(frame, np.ones(7, np.bool_))  # no mask has one dimension
