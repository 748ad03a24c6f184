"""Time `imcnet segment` on a machine with other work: ``python benchmarks/threads.py``.

Segments frames of a rendered scene, 640×360, with three settings in turns: OpenMP's default, where threads
wait in busy loops; passive waiting, which the command sets; and one thread. It first runs on the machine as
it is, then beside busy processes, one per core. Prints the median seconds of a command over the rounds, and
its ratio to passive waiting.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from PIL import Image

from model.scenes import render_scene

SETTINGS = {
    "default": {"GOMP_SPINCOUNT": "300000"},  # what libgomp takes where nothing is set
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_THREADS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=len(os.sched_getaffinity(0)), help="busy processes")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        frames = Path(directory) / "frames"
        frames.mkdir()
        for ordinal, (image, _) in enumerate(render_scene(frames=arguments.frames, height=360, width=640)):
            Image.fromarray(image).save(frames / f"{ordinal:04d}.png")
        for count in (0, arguments.busy):
            with busy_processes(count):
                report(compare(frames, arguments.rounds), busy=count)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare(frames: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by setting, a round each."""
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, setting in SETTINGS.items():
            seconds[name].append(segment(frames, setting))
    return seconds


def segment(frames: Path, setting: dict[str, str]) -> float:
    inherited = {name: value for name, value in os.environ.items() if name not in _THREADS}
    command = [sys.executable, "-m", "service.cli", "segment", "--device", "cpu", str(frames)]
    with tempfile.TemporaryDirectory() as masks:
        began = time.perf_counter()
        subprocess.run([*command, masks], env=inherited | setting, check=True, stderr=subprocess.DEVNULL)
        return time.perf_counter() - began


def report(seconds: dict[str, list[float]], *, busy: int) -> None:
    for name, runs in seconds.items():
        ratios = [run / passive for run, passive in zip(runs, seconds["passive"], strict=True)]
        print(
            f"{busy} busy processes, {name:10s}: {median(runs):5.1f} s, {median(ratios):.2f} times as long "
            f"as passively ({min(ratios):.2f}-{max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
