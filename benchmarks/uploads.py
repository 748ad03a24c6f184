"""The API under parallel uploads: ``python benchmarks/uploads.py --clients 8 --megabytes 256``.

Starts a Redis and an API of its own, sends bodies from as many clients at once, and asks for a job's status
all the while: in turns without keys, with a key, and, with ``--against FOLDER``, with the release that is
checked out there. Prints medians of the rounds, and the ratio to the first line within each round. The bodies
are an MP4 with padding, so that they pass the probe.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import av
import httpx
import numpy as np
import psutil

from service.cli.up import free_port
from service.embedded import EmbeddedRedis
from service.keys import KeyLimits, KeyStore
from service.processes import tethered

HERE = Path(__file__).resolve().parent.parent
CHUNK_BYTES = 2**20
IDLE_SECONDS = 3
COLUMNS = (
    "MiB/s",
    "API, peak MiB",
    "probes, peak MiB",
    "status idle, median ms",
    "status busy, median ms",
    "status busy, worst ms",
)
SETTINGS = {
    "IMCNET_LOG_LEVEL": "WARNING",
    "IMCNET_DISK_RESERVE_BYTES": "0",
    "IMCNET_KEY_REQUESTS_PER_MINUTE": "1000000",
    "IMCNET_KEY_ACTIVE_JOBS": "100000",
    "IMCNET_KEY_QUEUED_BYTES": str(2**50),
    "IMCNET_KEY_STORED_BYTES": str(2**50),
}


@dataclass(frozen=True)
class Figures:
    """In the order and the units of ``COLUMNS``."""

    throughput: float
    api: float
    probes: float
    idle: float
    busy: float
    worst: float


@dataclass(frozen=True)
class Variant:
    label: str
    folder: Path
    keyed: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="a checkout of another release")
    given = parser.parse_args()
    variants = [Variant("without keys", HERE), Variant("with a key", HERE, keyed=True)]
    if given.against:
        variants.insert(0, Variant("the other release", given.against.resolve()))
    rounds = []
    for number in range(given.rounds):
        rounds.append([measured(variant, given) for variant in variants])
        print(f"round {number + 1} of {given.rounds} is over", file=sys.stderr)
    print(f"{given.clients} uploads of {given.megabytes} MiB at once, medians of {given.rounds} rounds\n")
    print(f"| | {' | '.join(COLUMNS)} |\n| --- |{' --: |' * len(COLUMNS)}")
    for index, variant in enumerate(variants):
        cells = []
        for column in range(len(COLUMNS)):
            figures = [astuple(of[index])[column] for of in rounds]
            ratio = statistics.median(astuple(of[index])[column] / astuple(of[0])[column] for of in rounds)
            cells.append(f"{statistics.median(figures):.1f}" + (f" (× {ratio:.2f})" if index else ""))
        print(f"| {variant.label} | {' | '.join(cells)} |")


def measured(variant: Variant, given: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as name, EmbeddedRedis(Path(name) / "redis") as redis:
        data_dir, port = Path(name) / "data", free_port()
        headers = {"content-type": "video/mp4"}
        if variant.keyed:
            headers["authorization"] = (
                f"Bearer {KeyStore(data_dir / 'keys').create('benchmark', KeyLimits())[1]}"
            )
        environment = {
            **os.environ,
            **SETTINGS,
            "IMCNET_REDIS_URL": redis.url,
            "IMCNET_DATA_DIR": str(data_dir),
        }
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
        with subprocess.Popen(
            tethered(command), env=environment, cwd=variant.folder, stdout=subprocess.DEVNULL
        ) as api:
            try:
                return run(f"http://127.0.0.1:{port}", api.pid, small_video(Path(name)), headers, given)
            finally:
                api.terminate()


def run(url: str, pid: int, video: bytes, headers: dict[str, str], given: argparse.Namespace) -> Figures:
    wait_for(url)
    answer = httpx.post(f"{url}/jobs", content=video, headers=headers).raise_for_status()
    status_url = url + answer.headers["location"]
    idle = Latency(status_url, headers)
    with idle:
        time.sleep(IDLE_SECONDS)
    size = given.megabytes * 2**20
    statuses: list[int] = []

    def upload() -> None:
        sized = {**headers, "content-length": str(size)}
        answer = httpx.post(f"{url}/jobs", content=body(video, size), headers=sized, timeout=600)
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=upload) for _ in range(given.clients)]
    busy, memory = Latency(status_url, headers), PeakMemory(pid)
    began = time.monotonic()
    with busy, memory:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds = time.monotonic() - began
    if statuses != [202] * given.clients:
        raise SystemExit(f"not every upload was accepted: {sorted(statuses)}")
    return Figures(
        throughput=given.clients * given.megabytes / seconds,
        api=memory.api / 2**20,
        probes=memory.probes / 2**20,
        idle=1000 * statistics.median(idle.seconds),
        busy=1000 * statistics.median(busy.seconds),
        worst=1000 * max(busy.seconds),
    )


class PeakMemory:
    """Samples the RSS of the API and of its children, in bytes, for as long as the context lasts."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.api = self._process.memory_info().rss
        self.probes = 0
        self._sampler = Repeatedly(self._sample)

    def __enter__(self) -> None:
        self._sampler.start()

    def __exit__(self, *_: object) -> None:
        self._sampler.stop()

    def _sample(self) -> None:
        self.api = max(self.api, self._process.memory_info().rss)
        children = 0
        for child in self._process.children():
            try:
                children += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        self.probes = max(self.probes, children)


class Latency:
    """Asks for a job's status again and again for as long as the context lasts."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.seconds: list[float] = []
        self._url = url
        self._client = httpx.Client(timeout=60, headers=headers)
        self._asker = Repeatedly(self._ask)

    def __enter__(self) -> None:
        self._asker.start()

    def __exit__(self, *_: object) -> None:
        self._asker.stop()
        self._client.close()

    def _ask(self) -> None:
        began = time.monotonic()
        self._client.get(self._url).raise_for_status()
        self.seconds.append(time.monotonic() - began)


class Repeatedly(threading.Thread):
    """Does something fifty times a second until it is stopped."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._action = action
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.02):
            self._action()

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def small_video(directory: Path) -> bytes:
    path = directory / "small.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for level in range(10):
            image = np.full((48, 64, 3), 20 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def body(video: bytes, size: int) -> Iterator[bytes]:
    """``video``, then a ``free`` box of zeros (ISO 14496-12, 8.1.2) up to ``size`` bytes in all."""
    padding = size - len(video)
    head = video + padding.to_bytes(4, "big") + b"free"
    yield head
    left = padding - 8
    while left > 0:
        count = min(left, CHUNK_BYTES)
        yield bytes(count)
        left -= count


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/livez")
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the API did not start")


if __name__ == "__main__":
    main()
