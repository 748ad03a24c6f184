"""The API under parallel uploads: ``python benchmarks/uploads.py --clients 8 --megabytes 256``.

Starts a Redis and an API of its own, sends bodies from as many clients at once, and asks for a job's status
all the while. Prints the peak of the API's memory (its RSS, and that of its probes apart), the throughput,
and the latency of the status requests beside that of the idle API, as a ratio. The bodies are an MP4 with
padding, so that they pass the probe.
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
from pathlib import Path

import av
import httpx
import numpy as np
import psutil

from service.cli.up import free_port
from service.embedded import EmbeddedRedis
from service.processes import tethered

CHUNK_BYTES = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=256)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, EmbeddedRedis(Path(name) / "redis") as redis:
        port = free_port()
        environment = {
            **os.environ,
            "IMCNET_REDIS_URL": redis.url,
            "IMCNET_DATA_DIR": f"{name}/data",
            "IMCNET_DISK_RESERVE_BYTES": "0",
        }
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
        with subprocess.Popen(tethered(command), env=environment, stdout=subprocess.DEVNULL) as api:
            try:
                run(f"http://127.0.0.1:{port}", api.pid, small_video(Path(name)), given)
            finally:
                api.terminate()


def run(url: str, pid: int, video: bytes, given: argparse.Namespace) -> None:
    wait_for(url)
    answer = httpx.post(f"{url}/jobs", content=video, headers={"content-type": "video/mp4"})
    status_url = url + answer.headers["location"]
    idle = Latency(status_url)
    with idle:
        time.sleep(3)
    size = given.megabytes * 2**20
    results: list[int] = []

    def upload() -> None:
        headers = {"content-type": "video/mp4", "content-length": str(size)}
        answer = httpx.post(f"{url}/jobs", content=body(video, size), headers=headers, timeout=600)
        results.append(answer.status_code)

    threads = [threading.Thread(target=upload) for _ in range(given.clients)]
    busy, memory = Latency(status_url), PeakMemory(pid)
    began = time.monotonic()
    with busy, memory:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds = time.monotonic() - began
    print(f"{given.clients} uploads of {given.megabytes} MiB: answers {sorted(results)}")
    print(f"throughput            {given.clients * given.megabytes / seconds:.0f} MiB/s")
    print(
        f"peak RSS of the API   {memory.api / 2**20:.0f} MiB, {memory.api / memory.before:.2f} × that before"
    )
    print(f"peak RSS of probes    {memory.probes / 2**20:.0f} MiB together")
    for label, of in (("median", statistics.median), ("maximum", max)):
        a, b = of(idle.seconds), of(busy.seconds)
        print(f"status, {label:8}      {a * 1000:.1f} ms idle, {b * 1000:.1f} ms busy: × {b / a:.1f}")


class PeakMemory:
    """Samples the RSS of the API and of its children, in bytes, for as long as the context lasts."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self.api = self._process.memory_info().rss
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

    def __init__(self, url: str) -> None:
        self.seconds: list[float] = []
        self._url = url
        self._client = httpx.Client(timeout=60)
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
