"""Memory of the segmenter on a long stream: ``python benchmarks/memory.py --frames 10000``.

Noise of 854×480 pixels, the weights that ship, at a small input size, so that it takes minutes: what is held
does not depend on how long a frame takes. Prints resident memory and the frames held, ten times on the way.
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import psutil
from numpy.typing import NDArray

from model.benchmark import Observed
from model.segmenter import Segmenter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--input-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()

    segmenter = Segmenter.load(device=arguments.device, input_size=arguments.input_size)
    segmenter.engines["exact"] = observed = Observed(segmenter.engines["exact"])
    began = time.perf_counter()
    for count, _ in enumerate(segmenter.segment(noise(arguments.frames)), start=1):
        if count % max(1, arguments.frames // 10) == 0:
            resident = psutil.Process().memory_info().rss / 2**20
            encodes = observed.work.encoded / count
            print(
                f"{count:6d} frames, {time.perf_counter() - began:4.0f} s: {resident:.0f} MiB resident, "
                f"at most {observed.work.cached} frames held, {encodes:.3f} encodes a frame",
                flush=True,
            )


def noise(frames: int) -> Iterator[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    for _ in range(frames):
        yield random.integers(0, 256, (480, 854, 3), np.uint8)


if __name__ == "__main__":
    main()
