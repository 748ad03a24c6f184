import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from service.errors import UnusableVideo
from service.media import MediaLimits
from tests.conftest import REPOSITORY
from tests.videos import (
    CLIPS,
    CORNERS,
    Clip,
    Image,
    corners,
    cut,
    damage_packets,
    growing_video,
    moving_square,
    noise,
    write_video,
)
from worker.decode import VideoFrame, VideoReader
from worker.packets import ends_early

FASTSTART = {"movflags": "+faststart"}
LOSSLESS = {"crf": "0", "preset": "ultrafast"}


def read(
    path: Path, *, max_corrupt_fraction: float = 0.05, **limits: int
) -> tuple[VideoReader, list[VideoFrame]]:
    with VideoReader(path, MediaLimits(**limits), max_corrupt_fraction=max_corrupt_fraction) as reader:
        return reader, list(reader)


def refusal(path: Path, *, max_corrupt_fraction: float = 0.05, **limits: int) -> UnusableVideo:
    with pytest.raises(UnusableVideo) as caught:
        read(path, max_corrupt_fraction=max_corrupt_fraction, **limits)
    assert str(path.parent) not in caught.value.detail
    return caught.value


def quarter_colours(image: Image) -> list[list[int]]:
    """The colours in the middle of the four quarters, in the order of CORNERS."""
    height, width = image.shape[:2]
    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    return [image[row, column].tolist() for row in rows for column in columns]


def looks_upright(image: Image) -> bool:
    return np.allclose(quarter_colours(image), CORNERS, atol=25)


# -- frames ----------------------------------------------------------------------------------------------


def test_frames_come_in_order_with_their_times(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_square(10), fps=5)
    reader, frames = read(video)
    assert reader.frames == len(frames) == 10
    assert (reader.width, reader.height, reader.fps) == (64, 48, 5.0)
    assert [frame.time_seconds for frame in frames] == pytest.approx([index / 5 for index in range(10)])
    assert all(frame.pts is not None for frame in frames)
    assert reader.warnings == ()


def parted(frames: Iterator[VideoFrame | None]) -> tuple[int, list[VideoFrame]]:
    """How many frames come as None, all of them first, and the rest."""
    every = list(frames)
    rest = [frame for frame in every if frame is not None]
    assert every == [None] * (len(every) - len(rest)) + rest
    return len(every) - len(rest), rest


def test_frames_that_are_passed_over_count_and_change_nothing_after_them(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_square(10))
    whole, frames = read(video)
    with VideoReader(video, MediaLimits(), max_corrupt_fraction=0.05) as reader:
        passed_over, rest = parted(reader.frames_from(7))
    assert passed_over == 7
    assert (reader.frames, reader.warnings) == (whole.frames, whole.warnings)
    assert [frame.pts for frame in rest] == [frame.pts for frame in frames[7:]]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(rest, frames[7:], strict=True))


def test_the_picture_is_what_was_encoded(tmp_path: Path) -> None:
    originals = list(moving_square(6))
    video = write_video(tmp_path / "v.mkv", originals, pix_fmt="yuv444p", codec_options=LOSSLESS)
    for original, frame in zip(originals, read(video)[1], strict=True):
        assert frame.image.dtype == np.uint8
        assert frame.image.flags.c_contiguous
        assert np.abs(frame.image.astype(int) - original).max() <= 4  # RGB → YUV → RGB rounds


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, rotation: int) -> None:
    stored = np.rot90(corners(), k=rotation // 90)  # a player turns it back, clockwise
    reader, frames = read(write_video(tmp_path / "v.mp4", [stored] * 3, rotation=rotation))
    assert (reader.width, reader.height) == (64, 48)
    assert all(frame.image.shape == (48, 64, 3) and looks_upright(frame.image) for frame in frames)


@pytest.mark.parametrize(
    ("codec", "suffix", "pix_fmt"),
    [
        ("libx264", "mp4", "yuv420p10le"),
        ("libx264", "mkv", "yuv444p"),
        ("libx264", "ts", "yuv420p"),
        ("libx265", "mov", "yuv422p10le"),
        ("libvpx", "webm", "yuv420p"),
        ("libvpx-vp9", "webm", "yuva420p"),
        ("mpeg4", "avi", "yuv420p"),
        ("mpeg2video", "ts", "yuv420p"),
        ("mjpeg", "avi", "yuvj420p"),
        ("prores_ks", "mov", "yuv444p10le"),
    ],
)
def test_a_codec_is_decoded(tmp_path: Path, codec: str, suffix: str, pix_fmt: str) -> None:
    video = write_video(tmp_path / f"v.{suffix}", [corners()] * 5, codec=codec, pix_fmt=pix_fmt)
    reader, frames = read(video)
    assert len(frames) == 5
    assert all(looks_upright(frame.image) for frame in frames)
    assert reader.warnings == ()


def test_odd_sizes_are_kept(tmp_path: Path) -> None:
    picture = corners(width=321, height=241)
    reader, frames = read(write_video(tmp_path / "v.mp4", [picture] * 2, pix_fmt="yuv444p"))
    assert (reader.width, reader.height) == (321, 241)
    assert frames[0].image.shape == (241, 321, 3)
    assert frames[0].image.flags.c_contiguous


def test_a_single_frame_is_a_video(tmp_path: Path) -> None:
    assert len(read(write_video(tmp_path / "v.mp4", moving_square(1)))[1]) == 1


def test_varying_frame_intervals_are_kept_and_cut_nothing(tmp_path: Path) -> None:
    pts = [0, 1, 2, 10, 11, 60, 61]
    _, frames = read(write_video(tmp_path / "v.mp4", moving_square(7), fps=10, pts=pts))
    assert [frame.time_seconds for frame in frames] == pytest.approx([value / 10 for value in pts])


def test_a_slide_show_is_not_taken_for_a_cut_file(tmp_path: Path) -> None:
    reader, frames = read(write_video(tmp_path / "v.mkv", moving_square(4), fps=1, pts=[0, 5, 10, 15]))
    assert len(frames) == 4
    assert [warning.code for warning in reader.warnings] == ["missing_frames"]


def test_an_unusual_colour_matrix_is_no_failure(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", [corners()] * 2, codec_options={"colormatrix": "YCgCo"})
    assert len(read(video)[1]) == 2


@pytest.mark.parametrize("color_trc", [16, 18])
def test_high_dynamic_range_is_told(tmp_path: Path, color_trc: int) -> None:
    video = write_video(tmp_path / "v.mp4", moving_square(2), pix_fmt="yuv420p10le", color_trc=color_trc)
    assert [warning.code for warning in read(video)[0].warnings] == ["hdr"]


@pytest.mark.data
@pytest.mark.parametrize(("name", "clip"), CLIPS.items(), ids=CLIPS)
def test_a_real_clip_is_decoded(data_dir: Path, name: str, clip: Clip) -> None:
    reader, frames = read(data_dir / "clips" / name)
    assert reader.frames == len(frames) == clip.decodes
    assert {frame.image.shape for frame in frames} == {(clip.height, clip.width, 3)}
    assert [w.code for w in reader.warnings] == (["damaged_frames"] if name == "corrupted.mp4" else [])


@pytest.mark.data
def test_no_real_sequence_is_taken_for_a_damaged_one(data_dir: Path) -> None:
    sequences = sorted((data_dir / "davis16").glob("*/*.mp4"))
    assert sequences
    for path in sequences[::8]:
        reader, frames = read(path)
        assert reader.warnings == ()
        assert len(frames) > 20


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_square(600, width=320, height=240), fps=60)
    process = psutil.Process()
    with VideoReader(video, MediaLimits(), max_corrupt_fraction=0) as reader:
        frames = iter(reader)
        for _ in range(60):
            next(frames)
        before = process.memory_info().rss
        for _ in frames:
            pass
    assert process.memory_info().rss - before < 32 * 2**20  # the rest of the frames together are 124 MB


# -- damage ----------------------------------------------------------------------------------------------


@pytest.fixture
def long_video(tmp_path: Path) -> Path:
    """100 frames in 4 s, none of which needs another."""
    return write_video(tmp_path / "long.mp4", noise(100), codec_options={"g": "1"})


def test_a_few_damaged_packets_are_left_out_and_told(long_video: Path) -> None:
    reader, frames = read(damage_packets(long_video, [47, 63]))
    assert len(frames) == 98
    assert [frame.pts for frame in frames] == sorted(frame.pts or 0 for frame in frames)
    (warning,) = reader.warnings
    assert warning.code == "damaged_frames"
    assert warning.detail.startswith("2 of the video's 100 packets")


def test_many_damaged_packets_are_refused_with_their_number(long_video: Path) -> None:
    error = refusal(damage_packets(long_video, range(20, 80, 10)))
    assert error.code == "corrupt_input"
    assert error.detail.startswith("6 of the video's 100 packets")


def test_how_much_damage_is_too_much_is_for_the_caller(long_video: Path) -> None:
    damage_packets(long_video, [47])
    assert refusal(long_video, max_corrupt_fraction=0).code == "corrupt_input"
    assert read(long_video, max_corrupt_fraction=1)[0].frames == 99


def test_damage_at_the_very_end_costs_only_the_damaged_frames(long_video: Path) -> None:
    assert len(read(damage_packets(long_video, [95, 98, 99]))[1]) == 97


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mp4", "libx265"), ("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")],
)
def test_a_file_cut_in_half_is_refused(tmp_path: Path, suffix: str, codec: str) -> None:
    options = {} if suffix != "mp4" else FASTSTART
    video = write_video(tmp_path / f"v.{suffix}", noise(100), codec=codec, container_options=options)
    error = refusal(cut(video, 0.5))
    assert error.code == "truncated_input"
    assert "breaks off after" in error.detail


def test_a_short_file_cut_in_half_is_refused_as_well(tmp_path: Path) -> None:
    assert refusal(cut(write_video(tmp_path / "v.mkv", noise(50)), 0.5)).code == "truncated_input"


def test_a_cut_transport_stream_is_as_long_as_it_is(tmp_path: Path) -> None:
    """It declares no length, so nothing tells that there was more."""
    frames = read(cut(write_video(tmp_path / "v.ts", noise(100), codec_options={"g": "10"}), 0.5))[1]
    assert 40 <= len(frames) <= 60


def test_a_transport_stream_that_starts_between_key_frames_is_not_damaged(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.ts", noise(60), codec_options={"g": "20"})
    data = video.read_bytes()
    video.write_bytes(data[len(data) // 6 // 188 * 188 :])
    reader, frames = read(video)
    assert 35 <= len(frames) <= 50
    assert "damaged_frames" not in [warning.code for warning in reader.warnings]


def test_frames_that_the_container_swallows_are_told(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.webm", noise(100), codec="libvpx", codec_options={"g": "10"})
    data = bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 5] = bytes(len(data) // 5)
    video.write_bytes(data)
    reader, frames = read(video, max_corrupt_fraction=1)
    assert len(frames) < 95
    assert "missing_frames" in [warning.code for warning in reader.warnings]


def test_zeroed_pictures_are_not_a_video(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", noise(20), container_options=FASTSTART)
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    video.write_bytes(data)
    assert refusal(video).code == "undecodable_stream"


@pytest.mark.parametrize(
    ("declared", "reached", "frames", "early"),
    [
        (10.0, 10.0, 250, False),
        (10.0, 9.5, 250, False),
        (10.0, 9.4, 250, True),
        (600.0, 571.0, 15_000, False),
        (600.0, 569.0, 15_000, True),
        (15.0, 10.0, 4, False),  # a slide show: the last of four pictures has no length of its own
        (1.0, 0.2, 6, True),
        (5.0, 7.0, 100, False),
        (0.04, 0.0, 1, False),
    ],
)
def test_a_video_ends_early_beyond_a_tolerance(
    declared: float, reached: float, frames: int, early: bool
) -> None:
    assert ends_early(declared, reached, frames=frames) is early


# -- limits ----------------------------------------------------------------------------------------------


def test_frames_are_counted_as_they_come(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_square(10))
    assert len(read(video, max_frames=10)[1]) == 10
    assert refusal(video, max_frames=9).code == "too_many_frames"


def test_sizes_are_held_against_the_limits(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_square(2))
    assert refusal(video, min_side=49).code == "dimensions_below_limit"
    assert refusal(video, max_pixels=64 * 48 - 1).code == "dimensions_exceed_limit"
    read(video, min_side=48, max_pixels=64 * 48)


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    return growing_video(tmp_path / "growing.ts")


def test_a_change_of_size_keeps_the_first_size_and_is_told(growing: Path) -> None:
    reader, frames = read(growing, max_corrupt_fraction=1)
    assert [frame.image.shape for frame in frames] == [(48, 64, 3)] * 10
    assert reader.warnings[0].code == "resolution_change"
    assert "64×48 to 128×64 pixels at frame 5" in reader.warnings[0].detail


def test_a_change_of_size_is_told_by_a_reader_that_passes_it_over(growing: Path) -> None:
    whole, _ = read(growing, max_corrupt_fraction=1)
    with VideoReader(growing, MediaLimits(), max_corrupt_fraction=1) as reader:
        _, rest = parted(reader.frames_from(whole.frames - 1))
    assert len(rest) == 1
    assert rest[0].image.shape == (whole.height, whole.width, 3)
    assert reader.warnings == whole.warnings


def test_growing_beyond_the_limit_is_refused(growing: Path) -> None:
    error = refusal(growing, max_corrupt_fraction=1, max_pixels=64 * 48)
    assert error.code == "dimensions_exceed_limit"


def test_a_reader_that_is_left_early_closes_its_file(long_video: Path) -> None:
    with VideoReader(long_video, MediaLimits(), max_corrupt_fraction=0) as reader:
        next(iter(reader))
        assert str(long_video) in {file.path for file in psutil.Process().open_files()}
    assert str(long_video) not in {file.path for file in psutil.Process().open_files()}


# -- memory ----------------------------------------------------------------------------------------------


def read_within(path: Path, extra_bytes: int) -> str:
    """What a process that may take so much more memory says of a video: its frames, or why it is refused."""
    program = f"""if True:
        import re
        import resource
        from pathlib import Path
        from service.errors import UnusableVideo
        from service.media import MediaLimits
        from service.processes import limit_resources
        from worker.decode import VideoReader

        taken = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        limit_resources({{resource.RLIMIT_DATA: taken + {extra_bytes}}})
        try:
            with VideoReader(Path({str(path)!r}), MediaLimits(), max_corrupt_fraction=0.05) as reader:
                print(sum(1 for _ in reader))
        except UnusableVideo as error:
            print(error.code)
    """
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_a_video_that_takes_too_much_memory_is_refused_for_that(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_square(3, width=3840, height=2160))
    assert read_within(video, 80 * 2**20) == "resource_limit"
    assert read_within(video, 2**30) == "3"
