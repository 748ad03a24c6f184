"""Every hostile or odd input that this service has an answer for, and the answer. Seeded, small, made here.

Where an input needs gigabytes to be harmful, what is made here is as harmful: pictures and tables compress.
"""

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path

import av
import numpy as np
import PIL.Image
from av.audio.stream import AudioStream
from av.stream import Disposition
from av.video.stream import VideoStream

from tests.hostile.boxes import box, changed, full, patched
from tests.videos import CLIPS, Image, cut, damage_packets, growing_video, moving_square, noise, write_video

STSD = "moov/trak/mdia/minf/stbl/stsd"
STBL = "moov/trak/mdia/minf/stbl"
FASTSTART = {"movflags": "+faststart"}
HUGE = 16_000  # pixels a side
INTERLACED = {"flags": "+ildct+ilme"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An input and what it gets.

    ``refused``: at upload, with this HTTP status and code. ``fails``: accepted, and the job fails with this
    code. Neither: it is a video, with ``frames`` (None: any number but zero) and ``warnings``.
    """

    name: str
    build: Callable[[Path], object]
    refused: tuple[int, str] | None = None
    fails: str | None = None
    frames: int | None = None
    warnings: tuple[str, ...] = ()
    filename: str = "upload"

    @property
    def accepted(self) -> bool:
        return self.refused is None and self.fails is None


# -- no videos -------------------------------------------------------------------------------------------


def _bytes(content: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "b" * 5000)


def _still(name: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        PIL.Image.new("RGB", (64, 48)).save(path, format=name)

    return write


PLAYLISTS = {
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nneighbour.mp4\n#EXT-X-ENDLIST\n",
    "HLS master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\nneighbour.m3u8\n",
    "DASH": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1000"><BaseURL>neighbour.mp4'
    "</BaseURL></Representation></AdaptationSet></Period></MPD>\n",
    "SMIL": '<smil><body><video src="neighbour.mp4"/></body></smil>\n',
}
FFCONCAT = "ffconcat version 1.0\nfile neighbour.mp4\n"
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n"
)


# -- videos, plain ---------------------------------------------------------------------------------------


def _video(
    container_format: str, frames: Callable[[], Iterator[Image]], **options: object
) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        return write_video(path, frames(), container_format=container_format, **options)  # type: ignore[arg-type]

    return write


def _few() -> Iterator[Image]:
    return moving_square(5)


def _many() -> Iterator[Image]:
    return noise(100)


def _sized(width: int, height: int, count: int = 3) -> Callable[[], Iterator[Image]]:
    return lambda: moving_square(count, width=width, height=height)


def _black(count: int, *, width: int, height: int) -> Iterator[Image]:
    return (np.zeros((height, width, 3), np.uint8) for _ in range(count))


_mp4 = partial(_video, "mp4")


# -- videos, other streams than one ----------------------------------------------------------------------


def _silence(sample_format: str) -> av.AudioFrame:
    frame = av.AudioFrame(format=sample_format, layout="stereo", samples=1024)
    frame.sample_rate = 44_100
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    return frame


def _sound(container_format: str, codec: str, *, cover: bool = False) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with av.open(str(path), "w", format=container_format) as container:
            picture = _add_cover(container) if cover else None
            stream = container.add_stream(codec, rate=44_100)
            assert isinstance(stream, AudioStream)
            if picture is not None:
                container.mux(picture.encode(av.VideoFrame(32, 32, "yuvj420p")))
                container.mux(picture.encode(None))
            container.mux(stream.encode(_silence(stream.format.name)))
            container.mux(stream.encode(None))

    return write


def _add_cover(container: av.container.OutputContainer) -> VideoStream:
    cover = container.add_stream("mjpeg", rate=25)
    assert isinstance(cover, VideoStream)
    cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
    cover.disposition = Disposition.attached_pic
    return cover


def _many_tracks(path: Path) -> None:
    def repeat(moov: bytes) -> bytes:
        start = moov.index(b"trak") - 4
        size = int.from_bytes(moov[start : start + 4])
        return moov[:start] + 900 * moov[start : start + size] + moov[start + size :]

    path.write_bytes(changed(_mp4_bytes(path), "moov", repeat))


# -- videos, edited --------------------------------------------------------------------------------------


def _mp4_bytes(path: Path, **options: object) -> bytes:
    return _mp4(_few, **{"codec_options": {"bf": "0"}, **options})(path).read_bytes()


def _edited(where: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(changed(_mp4_bytes(path), where, change))


def _rewritten(build: Callable[[Path], Path], change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.write_bytes(change(build(path).read_bytes()))

    return write


def _without_index(data: bytes) -> bytes:
    return data[: data.index(b"moov") - 4]


def _until_the_first_frame(data: bytes) -> bytes:
    return data[: data.index(b"mdat") + 4]


def _zeroed_pictures(data: bytes) -> bytes:
    start = data.index(b"mdat") + 4
    return data[:start] + bytes(len(data) - start)


def _without_key_frame(data: bytes) -> bytes:
    """All but the packets of the first half, in which the only key frame is."""
    return data[len(data) // 2 // 188 * 188 :]


def _halved(container_format: str, **options: object) -> Callable[[Path], object]:
    return lambda path: cut(_video(container_format, _many, **options)(path), 0.5)


def _damaged(count: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        damage_packets(_mp4(_many, codec_options={"g": "1"})(path), range(20, 20 + 10 * count, 10))

    return write


def _claims_65535(path: Path) -> None:
    data = changed(
        _mp4(_sized(320, 240))(path).read_bytes(), "moov/trak/tkhd", patched(-8, ">II", *[0xFFFF0000] * 2)
    )
    # The only sample entry: 8 bytes into its box's content, and its size 32 bytes further.
    path.write_bytes(changed(data, STSD, patched(8 + 32, ">HH", 65535, 65535)))


def _sample_table_bomb(path: Path) -> None:
    """50 million samples of one byte each, for which FFmpeg would make an index of 1.2 GB."""
    count = 50_000_000
    data = _mp4_bytes(path)
    for table, content in (
        ("stsz", full(0, 1, count)),
        ("stts", full(0, 1, count, 1)),
        ("stsc", full(0, 1, 1, count, 1)),
    ):
        data = changed(data, f"{STBL}/{table}", lambda _, content=content: content)  # type: ignore[misc]
    path.write_bytes(data)


def _with_offsets(version: int, offsets: list[int]) -> Callable[[Path], object]:
    """Frames whose pts differ from their dts by these numbers of ticks."""
    entries = list(chain.from_iterable((1, offset % 2**32) for offset in offsets))

    def edit(trak: bytes) -> bytes:
        content = full(version, len(offsets), *entries)
        trak = changed(trak, "mdia/minf/stbl", lambda stbl: stbl + box(b"ctts", content))
        return trak.replace(b"edts", b"free")  # an edit list would cut what lies before 0

    return _edited("moov/trak", edit)


def _deltas(*deltas: int) -> Callable[[Path], object]:
    entries = list(chain.from_iterable((1, delta) for delta in deltas))
    return _edited(f"{STBL}/stts", lambda _: full(0, len(deltas), *entries))


def _pixel_aspect(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for image in _few():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _polyglot(path: Path) -> None:
    _mp4(_few)(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("index.html", "<script>alert(1)</script>")


# -- bombs -----------------------------------------------------------------------------------------------


def _png_bomb(path: Path) -> None:
    """A grey picture of 256 MB in 250 kB, as PNG in QuickTime."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(content, zlib.crc32(kind))
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    packer, rows = zlib.compressobj(), bytes((1 + HUGE) * 100)
    pixels = b"".join(packer.compress(rows) for _ in range(HUGE // 100)) + packer.flush()
    picture = b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, content)
        for kind, content in (
            (b"IHDR", struct.pack(">IIBBBBB", HUGE, HUGE, 8, 0, 0, 0, 0)),
            (b"IDAT", pixels),
            (b"IEND", b""),
        )
    )
    _write_packet(path, picture, codec="png", pix_fmt="gray")


def _write_packet(path: Path, content: bytes, *, codec: str, pix_fmt: str) -> None:
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = HUGE, HUGE, pix_fmt
        packet: av.Packet[VideoStream] = av.Packet(content)
        packet.stream, packet.is_keyframe = stream, True
        packet.pts = packet.dts = 0
        packet.time_base = Fraction(1, 25)
        container.mux(packet)


def _huge_h264(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        options = {
            "preset": "ultrafast",
            "x264-params": "bframes=0:ref=1:rc-lookahead=0:sync-lookahead=0:threads=1",
        }
        stream = container.add_stream("libx264", rate=25, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = HUGE, HUGE, "gray"
        black = np.zeros((HUGE, HUGE), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(black, format="gray")))
        container.mux(stream.encode(None))


# -- all of it -------------------------------------------------------------------------------------------

_NOT_A_VIDEO, _CONTAINER, _CODEC = (
    (422, "not_a_video"),
    (415, "unsupported_container"),
    (415, "unsupported_codec"),
)
_UNDECODABLE = (422, "undecodable_stream")


def _no_videos() -> Iterator[Entry]:
    yield Entry(name="empty", build=Path.touch, refused=(422, "empty_file"))
    for name, build in {
        "one byte": _bytes(b"x"),
        "zeros": _bytes(bytes(100_000)),
        "random": _bytes(np.random.default_rng(0).bytes(100_000)),
        "text": _bytes("hello world\n" * 1000),
        "html": _bytes("<!doctype html><html><body>hello</body></html>"),
        "zip": _zip,
        "mp4 without an index": _rewritten(_mp4(_few), _without_index),
    }.items():
        yield Entry(name=name, build=build, refused=_NOT_A_VIDEO)
    for name, build in {
        "png": _still("png"),
        "jpeg": _still("jpeg"),
        "gif": _video("gif", _few, codec="gif", pix_fmt="rgb8"),
        "mp3": _sound("mp3", "libmp3lame"),
        "raw h264": _video("h264", _few),
        "sdp": _bytes(SDP),
        "ffconcat": _bytes(FFCONCAT),
    }.items():
        yield Entry(name=name, build=build, refused=_CONTAINER)
    for kind, text in PLAYLISTS.items():
        for filename in ("clip.m3u8", "clip.mpd", "clip.mp4"):
            name = f"{kind} playlist named {filename}"
            yield Entry(name=name, build=_bytes(text), refused=_NOT_A_VIDEO, filename=filename)


def _refused_videos() -> Iterator[Entry]:
    for name, build in {
        "magicyuv": _video("avi", _few, codec="magicyuv", pix_fmt="gbrp"),
        "qtrle": _video("mov", _few, codec="qtrle", pix_fmt="rgb24"),
        "ffv1": _video("matroska", _few, codec="ffv1"),
        "png in mov, 16000²": _png_bomb,
    }.items():
        yield Entry(name=name, build=build, refused=_CODEC)
    for name, build in {
        "sound alone": _sound("mp4", "aac"),
        "sound with cover art": _sound("mp4", "aac", cover=True),
    }.items():
        yield Entry(name=name, build=build, refused=(422, "no_video_stream"))
    for name, build in {
        "cut before the first frame": _rewritten(
            _mp4(_few, container_options=FASTSTART), _until_the_first_frame
        ),
        "zeroed mdat": _rewritten(_mp4(_few, container_options=FASTSTART), _zeroed_pictures),
        "transport stream without a key frame": _rewritten(_video("mpegts", _many), _without_key_frame),
    }.items():
        yield Entry(name=name, build=build, refused=_UNDECODABLE)
    small, large, long = "dimensions_below_limit", "dimensions_exceed_limit", "duration_exceeds_limit"
    yield Entry(name="14×14", build=_mp4(lambda: noise(3, width=14, height=14)), refused=(422, small))
    yield Entry(name="h264 of 16000²", build=_huge_h264, refused=(422, large))
    ticks = [0, 1, 2, 3, 18 * 86_400 + 43_200]
    yield Entry(
        name="5 frames in 18.5 days", build=_video("matroska", _few, fps=1, pts=ticks), refused=(422, long)
    )
    yield Entry(name="sample-table bomb", build=_sample_table_bomb, refused=(422, "too_many_frames"))
    yield Entry(name="900 tracks", build=_many_tracks, refused=(422, "too_many_streams"))


def _failing_videos() -> Iterator[Entry]:
    for name, build in {
        "mp4 cut in half": _halved("mp4", container_options=FASTSTART),
        "mkv cut in half": _halved("matroska"),
        "avi cut in half": _halved("avi", codec="mpeg4"),
    }.items():
        yield Entry(name=name, build=build, fails="truncated_input")
    yield Entry(name="damaged by 6 %", build=_damaged(6), fails="corrupt_input")


def _videos() -> Iterator[Entry]:
    # It declares no length, so nothing tells that there was more.
    yield Entry(
        name="transport stream cut in half",
        build=_halved("mpegts", codec_options={"g": "10"}),
        warnings=("damaged_frames",),
    )
    yield Entry(name="damaged by 2 %", build=_damaged(2), frames=98, warnings=("damaged_frames",))
    yield Entry(name="one frame", build=_mp4(lambda: moving_square(1)), frames=1)
    yield Entry(name="16×16", build=_mp4(lambda: noise(3, width=16, height=16)), frames=3)
    yield Entry(name="321×241", build=_mp4(_sized(321, 241), pix_fmt="yuv444p"), frames=3)
    yield Entry(
        name="another resolution half-way",
        build=partial(growing_video, frames=30),
        frames=60,
        warnings=("resolution_change", "damaged_frames"),
    )
    for rotation in (90, 180, 270):
        yield Entry(name=f"rotated by {rotation}°", build=_video("mov", _few, rotation=rotation), frames=5)
    yield Entry(name="pixel aspect 2:1", build=_pixel_aspect, frames=5)
    yield Entry(name="10 bits", build=_mp4(_few, pix_fmt="yuv420p10le"), frames=5)
    hdr10 = _mp4(
        _few,
        codec="libx265",
        pix_fmt="yuv420p10le",
        color_trc=16,
        codec_options={"x265-params": "log-level=0"},
    )
    yield Entry(name="HDR10", build=hdr10, frames=5, warnings=("hdr",))
    alpha = _video("webm", _few, codec="libvpx-vp9", pix_fmt="yuva420p")
    yield Entry(name="vp9 with alpha", build=alpha, frames=5)
    yield Entry(name="interlaced", build=_mp4(_few, codec_options=INTERLACED), frames=5)
    yield Entry(name="header claims 65535²", build=_claims_65535, frames=3)
    yield Entry(
        name="4K black, 50 frames",
        build=_mp4(partial(_black, 50, width=3840, height=2160), codec_options={"preset": "ultrafast"}),
        frames=50,
    )
    yield Entry(name="mp4 and zip in one", build=_polyglot, frames=5)
    yield from _odd_times()


def _odd_times() -> Iterator[Entry]:
    for name, build in {
        "negative pts": _with_offsets(1, [-5000] * 5),
        "backward pts": _with_offsets(1, [2048, 1024, 0, -1024, -2048]),
        "duplicate pts": _deltas(512, 0, 512, 0, 512),
        "all pts zero": _deltas(0, 0, 0, 0, 0),
        "no pts, in avi": _video("avi", _few, codec="mpeg4", codec_options={"bf": "2"}),
        "varying frame rate": _mp4(_few, fps=10, pts=[0, 1, 7, 8, 30]),
    }.items():
        yield Entry(name=name, build=build, frames=5)


MADE: tuple[Entry, ...] = (*_no_videos(), *_refused_videos(), *_failing_videos(), *_videos())


def real_clips(clips: Path) -> tuple[Entry, ...]:
    """The development clips, as entries that copy them."""

    def copy(name: str) -> Callable[[Path], object]:
        return lambda path: path.write_bytes((clips / name).read_bytes())

    known = tuple(
        Entry(
            name=name,
            build=copy(name),
            frames=clip.decodes,
            warnings=("damaged_frames",) if name == "corrupted.mp4" else (),
            filename=name,
        )
        for name, clip in CLIPS.items()
    )
    pixel = replace(known[0], name="bitmap.mp4", build=copy("bitmap.mp4"), frames=None, filename="bitmap.mp4")
    return (*known, replace(pixel, refused=(422, "dimensions_below_limit")))
