import io
import json
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from service.jobs import ArtifactKind, JobOptions, ModelInfo
from worker.artifacts import encode_mask, finish, open_writer, tint
from worker.decode import VideoFrame
from worker.protocol import Mask

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


def write(kind: ArtifactKind, directory: Path, content: list[tuple[VideoFrame, Mask]]) -> Path:
    directory.mkdir(exist_ok=True)
    with open_writer(kind, directory, options=JobOptions(), model=MODEL, fps=25.0) as writer:
        for frame, mask in content:
            writer.add(frame, mask)
    artifact = finish(writer)
    assert artifact.bytes == writer.path.stat().st_size
    assert artifact.name == writer.path.name
    return writer.path


def test_a_mask_is_a_one_bit_png_of_0_and_255() -> None:
    ((_, mask),) = frames(1)
    image = Image.open(io.BytesIO(encode_mask(mask)))
    assert (image.mode, image.size) == ("1", (47, 33))
    assert np.array_equal(np.asarray(image.convert("L")), np.where(mask, 255, 0))


def test_the_archive_holds_every_mask_and_a_manifest_of_the_content_alone(tmp_path: Path) -> None:
    content = frames(3)
    with zipfile.ZipFile(write(ArtifactKind.MASKS, tmp_path, content)) as archive:
        assert archive.namelist() == [*(f"masks/{i:08d}.png" for i in range(3)), "manifest.json"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        manifest = json.loads(archive.read("manifest.json"))
        last = np.asarray(Image.open(io.BytesIO(archive.read("masks/00000002.png"))))
    assert np.array_equal(last, content[2][1])
    assert (manifest["height"], manifest["width"], manifest["fps"]) == (33, 47, 25.0)
    assert manifest["frames"][1] == {"file": "masks/00000001.png", "pts": 512, "time_s": 0.04}
    assert manifest["options"] == {"threshold": 0.5, "max_side": None, "quality": "exact"}
    assert manifest["model"] == MODEL.model_dump()


def test_equal_masks_give_equal_bytes(tmp_path: Path) -> None:
    first = write(ArtifactKind.MASKS, tmp_path / "a", frames(3)).read_bytes()
    assert write(ArtifactKind.MASKS, tmp_path / "b", frames(3)).read_bytes() == first


def test_the_overlay_shows_every_frame_at_its_time(tmp_path: Path) -> None:
    content = frames(4)
    # Variable rate, and a time that stands still: the overlay has to move forward all the same.
    times = [0.0, 0.5, 0.5, 2.0]
    content = [(VideoFrame(f.image, None, t), m) for (f, m), t in zip(content, times, strict=True)]
    path = write(ArtifactKind.OVERLAY, tmp_path, content)
    with av.open(str(path)) as container:
        shown = list(container.decode(video=0))
    assert [(frame.height, frame.width) for frame in shown] == [(32, 46)] * 4  # H.264 has even sizes only
    assert [frame.time for frame in shown] == pytest.approx([0.0, 0.5, 0.54, 2.0])


def test_the_overlay_has_the_masks_size(tmp_path: Path) -> None:
    ((frame, _),) = frames(1, height=96, width=64)
    path = write(ArtifactKind.OVERLAY, tmp_path, [(frame, np.ones((48, 32), np.bool_))] * 2)
    with av.open(str(path)) as container:
        assert {(f.height, f.width) for f in container.decode(video=0)} == {(48, 32)}


def test_tinting_changes_the_foreground_only() -> None:
    ((frame, mask),) = frames(1)
    tinted = tint(frame.image, mask)
    assert np.array_equal(tinted[~mask], frame.image[~mask])
    assert not np.array_equal(tinted[mask], frame.image[mask])


@pytest.mark.parametrize("kind", list(ArtifactKind))
def test_a_writer_that_is_left_by_an_error_lets_the_error_through(kind: ArtifactKind, tmp_path: Path) -> None:
    ((frame, _),) = frames(1)
    with (
        pytest.raises((ValueError, TypeError), match="unpack"),
        open_writer(kind, tmp_path, options=JobOptions(), model=MODEL, fps=None) as writer,
    ):
        writer.add(frame, np.ones(7, np.bool_))  # no mask has one dimension
