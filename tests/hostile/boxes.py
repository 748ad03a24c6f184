"""MP4 files taken apart and put together again: boxes, ISO 14496-12."""

import struct
from collections.abc import Callable, Iterator


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each box that ``data`` consists of."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start + 8 : start + size]
        start += size


def changed(data: bytes, path: str, change: Callable[[bytes], bytes]) -> bytes:
    """``data`` with other content in the boxes at ``path``, such as ``moov/trak/tkhd``; sizes follow.

    The index has to stand behind the pictures, where FFmpeg puts it: their offsets stay as they are.
    """
    name, _, rest = path.partition("/")

    def content(kind: bytes, body: bytes) -> bytes:
        if kind != name.encode():
            return body
        return changed(body, rest, change) if rest else change(body)

    return b"".join(box(kind, content(kind, body)) for kind, body in boxes(data))


def patched(offset: int, layout: str, *values: int) -> Callable[[bytes], bytes]:
    """A change that overwrites fields as ``struct`` lays them out; negative offsets count from the end."""

    def patch(body: bytes) -> bytes:
        start = offset % len(body)
        new = struct.pack(layout, *values)
        return body[:start] + new + body[start + len(new) :]

    return patch


def full(version: int, *numbers: int, layout: str = "I") -> bytes:
    """A full box's content: version, no flags, and numbers of one kind."""
    return struct.pack(f">I{len(numbers)}{layout}", version << 24, *numbers)
