"""Files that point elsewhere: reading one opens nothing else, and connects to nobody.

The probe runs under strace, with canaries around it: files beside the hostile one, and a server on loopback.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import PIL.Image
import pytest

from service.media import MediaLimits
from tests.conftest import REPOSITORY
from tests.hostile.boxes import box, changed
from tests.hostile.corpus import FFCONCAT, PLAYLISTS, SDP
from tests.videos import moving_square, write_video

SECONDS = 2.0
MEMORY = str(3 * 2**29)
TRACED = ("-f", "--seccomp-bpf", "-ttt", "-s", "4096", "-e", "trace=openat,connect,bind,socket")
CALL = re.compile(r"^\d+ +(?P<time>[\d.]+) (?P<name>\w+)\((?P<arguments>.*)")
OURS = tuple(
    {*map(os.path.realpath, (sys.prefix, sys.base_prefix, REPOSITORY)), sys.prefix}
    | {"/usr/", "/lib", "/etc/", "/proc/", "/sys/", "/dev/", "__editable__."}
)


@dataclass(frozen=True)
class Canaries:
    """What a hostile file may point to: its neighbours in ``directory``, and a server."""

    directory: Path
    url: str
    requests: list[str]


Build = Callable[[Path, Canaries], object]


@pytest.fixture
def canaries(tmp_path: Path) -> Iterator[Canaries]:
    directory = tmp_path / "canaries"
    directory.mkdir()
    write_video(directory / "neighbour.mp4", moving_square(3))
    write_video(directory / "neighbour.ts", moving_square(3))
    (directory / "neighbour.m3u8").write_text(PLAYLISTS["HLS"].replace(".mp4", ".ts"))
    for number in range(3):
        PIL.Image.new("RGB", (64, 48)).save(directory / f"{number}.png")
    (directory / "subtitles.sub").write_bytes(bytes(4096))
    requests: list[str] = []

    class Canary(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Canary) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Canaries(directory, f"http://127.0.0.1:{server.server_port}", requests)
        server.shutdown()
        thread.join()


def _with_a_data_reference(path: Path, target: Path) -> None:
    """A QuickTime file whose samples lie elsewhere: an alias with an absolute path."""
    name = bytes(target.name, "ascii")
    there = bytes(str(target).replace("/", ":"), "ascii")
    alias = b"".join(
        (
            bytes(10 + 1 + 27 + 12),
            bytes([len(name)]) + name.ljust(63, b"\0"),
            bytes(16) + struct.pack(">HH", 1, 1) + bytes(16),
            struct.pack(">HH", 2, len(there)) + there + bytes(len(there) % 2),
            struct.pack(">HH", 0xFFFF, 0),
        )
    )
    reference = box(b"dref", bytes(4), struct.pack(">I", 1), box(b"alis", bytes(4), alias))
    data = write_video(path, moving_square(3), container_format="mov").read_bytes()
    path.write_bytes(changed(data, "moov/trak/mdia/minf/dinf", lambda _: reference))


def _text(text: str) -> Build:
    return lambda path, canaries: path.write_text(
        text.replace("<server>", canaries.url).replace("<directory>", str(canaries.directory))
    )


def _reference(path: Path, canaries: Canaries) -> None:
    _with_a_data_reference(path, canaries.directory / "neighbour.mp4")


def _still(path: Path, canaries: Canaries) -> None:
    shutil.copy(canaries.directory / "0.png", path)


VECTORS: dict[str, Build] = {
    **{kind: _text(text) for kind, text in PLAYLISTS.items()},
    **{
        f"{kind} over HTTP": _text(text.replace("neighbour.mp4", "<server>/video.mp4"))
        for kind, text in PLAYLISTS.items()
    },
    "HLS with a key": _text(
        '#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXT-X-KEY:METHOD=AES-128,URI="<server>/key"\n#EXTINF:10,\n'
        "file:<directory>/neighbour.ts\n#EXT-X-ENDLIST\n"
    ),
    "ffconcat": _text(FFCONCAT),
    "ffconcat of a path": _text("ffconcat version 1.0\nfile <directory>/neighbour.mp4\n"),
    "ffconcat over HTTP": _text("ffconcat version 1.0\nfile <server>/video.mp4\n"),
    "sdp": _text(SDP),
    "data reference": _reference,
    "vobsub": _text("# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n"),
    "image pattern": _still,
}
# The name under which FFmpeg takes it for what it is, where the content alone does not tell.
OWN_NAMES = {
    "data reference": "upload.mov",
    "vobsub": "subtitles.idx",
    "image pattern": "%d.png",
    "sdp": "upload.sdp",
}


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed")
    if subprocess.run([found, "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    return found


@pytest.mark.parametrize("name", ["upload", "upload.mp4", "upload.m3u8", "its own name"])
@pytest.mark.parametrize("vector", VECTORS)
def test_a_file_that_points_elsewhere_reaches_nobody(
    canaries: Canaries, strace: str, tmp_path: Path, vector: str, name: str
) -> None:
    path = canaries.directory / (name if name != "its own name" else OWN_NAMES.get(vector, "upload.m3u8"))
    VECTORS[vector](path, canaries)
    program = [*("-P", "-s", "-m", "service.probe", str(path)), *(json.dumps(asdict(MediaLimits())), MEMORY)]
    trace, output = traced(strace, program, tmp_path / "trace")
    # The data reference is a video, whose pictures are elsewhere: here, where there are none.
    assert str(canaries.directory) not in json.loads(output)["detail"]
    seen, seconds = calls(trace)
    assert [call for call in seen if is_foreign(call, path)] == []
    assert canaries.requests == []
    assert seconds < SECONDS


WITHOUT_THE_RECIPE = """
import sys, av
options = {"safe": "0", "enable_drefs": "1", "use_absolute_path": "1"}
with av.open(sys.argv[1], options=options) as container:
    next(container.decode(video=0))
"""


@pytest.mark.parametrize(
    ("vector", "name"),
    [
        ("ffconcat of a path", "upload"),
        ("HLS", "upload.m3u8"),
        ("data reference", "upload.mov"),
        ("image pattern", "%d.png"),
        ("vobsub", "subtitles.idx"),
    ],
)
def test_the_canaries_see_what_reaches_them_without_our_recipe(
    canaries: Canaries, strace: str, tmp_path: Path, vector: str, name: str
) -> None:
    path = canaries.directory / name
    VECTORS[vector](path, canaries)
    trace, _ = traced(strace, ["-c", WITHOUT_THE_RECIPE, str(path)], tmp_path / "trace")
    assert [call for call in calls(trace)[0] if is_foreign(call, path)]


def test_a_stream_from_a_file_object_is_what_must_not_be(canaries: Canaries) -> None:
    """The server of these tests hears of it when FFmpeg is let go: PyAV gives a file object no whitelist."""
    path = canaries.directory / "upload.m3u8"
    VECTORS["HLS over HTTP"](path, canaries)
    with open(path, "rb") as file, pytest.raises(av.FFmpegError), av.open(file, format="hls"):
        pass
    assert canaries.requests


def traced(strace: str, program: list[str], trace: Path) -> tuple[Path, str]:
    """Run Python under strace. Returns: Where it tells of the calls, and what the program said."""
    command = [strace, *TRACED, "-o", str(trace), sys.executable, *program]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    return trace, run.stdout


def calls(trace: Path) -> tuple[list[tuple[str, str]], float]:
    """The calls since FFmpeg was loaded, and the seconds from then to the end of the process."""
    lines = trace.read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if "libavformat" in line)
    matches = [match for line in lines[first:] if (match := CALL.match(line))]
    ended = float(lines[-1].split()[1])
    return [(match["name"], match["arguments"]) for match in matches], ended - float(matches[0]["time"])


def is_foreign(call: tuple[str, str], path: Path) -> bool:
    """Whether a call reaches beyond the file and what Python and its libraries load."""
    name, arguments = call
    if name != "openat":
        return True
    opened = arguments.partition('"')[2].partition('"')[0]
    return opened != str(path) and not opened.startswith(OURS)
