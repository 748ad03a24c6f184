"""A disk of its own for a test: small enough to be full, or read-only."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

_BLOCK = bytes(64 * 1024)


@contextmanager
def small_disk(directory: Path, *, size_bytes: int) -> Iterator[Path]:
    """Mount a memory disk of this size on ``directory``. Skips the test where this process may not mount."""
    directory.mkdir(parents=True, exist_ok=True)
    mounted = _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(directory))
    if mounted.returncode != 0:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        _run("umount", "--lazy", str(directory))


def remount(directory: Path, mode: Literal["ro", "rw"]) -> None:
    """Make a disk read-only or writable. Raises: AssertionError: The kernel refused, as while a file is open
    for writing."""
    done = _run("mount", "-o", f"remount,{mode}", str(directory))
    assert done.returncode == 0, done.stderr.decode()


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Let nothing be changed below ``directory`` any more, though files be open for writing.

    The kernel refuses to make such a disk read-only; so a read-only view of it is mounted over it.
    """
    path = str(directory)
    for command in (("--bind", path, path), ("-o", "remount,ro,bind", path)):
        mounted = _run("mount", *command)
        assert mounted.returncode == 0, mounted.stderr.decode()
    try:
        yield
    finally:
        _run("umount", "--lazy", path)


def fill(directory: Path, *, but_bytes: int = 0) -> Path:
    """Take all the room of a disk but so many bytes. Returns: The file to delete to give it back."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(_BLOCK)
        except OSError:
            file.truncate(max(0, file.tell() - but_bytes))
    return ballast


def _run(*command: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(command, capture_output=True, check=False)
