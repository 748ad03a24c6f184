"""Small real videos, and ways to damage them. Everything follows from the seed."""

import random
from collections.abc import Callable
from pathlib import Path

from tests.videos import moving_square, write_video

ORIGINALS = {
    "mp4": "libx264",
    "mkv": "libx265",
    "webm": "libvpx-vp9",
    "ts": "mpeg2video",
    "avi": "mpeg4",
    "mov": "prores_ks",
}
_CODEC_OPTIONS = {"libx265": {"x265-params": "log-level=0"}}
_PIX_FMTS = {"prores_ks": "yuv422p10le"}
_LENGTHS = (0, 1, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def write_originals(directory: Path) -> dict[str, bytes]:
    """A video of ten frames in each container."""
    return {
        suffix: write_video(
            directory / f"original.{suffix}",
            moving_square(10),
            codec=codec,
            pix_fmt=_PIX_FMTS.get(codec, "yuv420p"),
            codec_options=_CODEC_OPTIONS.get(codec),
        ).read_bytes()
        for suffix, codec in ORIGINALS.items()
    }


def mutated(original: bytes, chance: random.Random) -> bytes:
    """The original after one to three mutations."""
    data = bytearray(original)
    for _ in range(chance.randint(1, 3)):
        if len(data) > 16:
            chance.choice(_MUTATIONS)(data, chance)
    return bytes(data)


def _flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 32)):
        data[_place(data, chance)] ^= 1 << chance.randrange(8)


def _overwrite_a_run(data: bytearray, chance: random.Random) -> None:
    start, length = _place(data, chance), chance.randint(1, 64)
    fill = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])
    data[start : start + length] = fill[: len(data) - start]


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[_place(data, chance) :]


def _move_a_chunk(data: bytearray, chance: random.Random) -> None:
    start, length = _place(data, chance), chance.randint(1, max(1, len(data) // 4))
    chunk = data[start : start + length]
    del data[start : start + length]
    to = _place(data, chance) if data else 0
    data[to:to] = chunk


def _edit_a_size(data: bytearray, chance: random.Random) -> None:
    """Overwrite a length where boxes and chunks have theirs: beside a name of four letters, if any."""
    names = [at for at in range(4, len(data) - 8) if data[at : at + 4].isalpha()]
    at = chance.choice(names) - 4 if names else chance.randrange(len(data) - 4)
    at += chance.choice((0, 8))  # MP4 has the length before the name, RIFF behind it
    value = chance.choice((*_LENGTHS, chance.getrandbits(32), len(data)))
    data[at : at + 4] = value.to_bytes(4, chance.choice(("big", "little")))


def _place(data: bytearray, chance: random.Random) -> int:
    """Anywhere, or in the beginning or at the end, where the indices are."""
    zone = min(len(data), 1024)
    return chance.choice(
        (
            chance.randrange(len(data)),
            chance.randrange(zone),
            len(data) - 1 - chance.randrange(zone),
        )
    )


_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip_bits,
    _overwrite_a_run,
    _cut,
    _move_a_chunk,
    _edit_a_size,
)
