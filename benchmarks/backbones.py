"""Speed and memory of the segmenter per backbone, on this machine: ``python benchmarks/backbones.py``.

Each backbone runs in a process of its own, with random weights (they cost what trained ones cost), on noise
of 854×480 pixels. The ratio is to the first backbone of the run.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def measure(backbone: str, device: str, frames: int) -> dict[str, float]:
    """Load a network and segment ``frames`` frames; seconds, and MiB at the peak."""
    import numpy as np
    import torch

    from model.imcnet import IMCNetConfig
    from model.segmenter import Segmenter
    from model.weights import init_weights

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights.safetensors"
        init_weights(path, IMCNetConfig(backbone=backbone), seed=0)  # type: ignore[arg-type]
        megabytes = path.stat().st_size / 2**20
        began = time.monotonic()
        segmenter = Segmenter.load(path, device=device)
        load_s = time.monotonic() - began
    noise = np.random.default_rng(0)
    source = (noise.integers(0, 256, (480, 854, 3), np.uint8) for _ in range(frames))
    times = []
    masks = segmenter.segment(source)
    began = time.monotonic()
    for _ in masks:
        times.append(time.monotonic() - began)
        began = time.monotonic()
    steady = sorted(times[segmenter.layout.margin : -segmenter.layout.margin])  # one encode, one window each
    on_cuda = segmenter.device.type == "cuda"
    return {
        "file_mib": megabytes,
        "load_s": load_s,
        "frame_s": steady[len(steady) // 2],
        "process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gpu_mib": torch.cuda.max_memory_reserved() / 2**20 if on_cuda else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--child", choices=BACKBONES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child, given.device, given.frames)))
        return
    print(
        "| backbone | weights file, MiB | load, s | frame, s | ratio | peak of the process, MiB | GPU, MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = None
    for backbone in given.backbones:
        command = [sys.executable, __file__, "--child", backbone, "--device", given.device]
        child = subprocess.run(
            [*command, "--frames", str(given.frames)], capture_output=True, text=True, check=True
        )
        row = json.loads(child.stdout)
        first = first or row["frame_s"]
        print(
            f"| {backbone} | {row['file_mib']:.0f} | {row['load_s']:.2f} | {row['frame_s']:.3f} "
            f"| {row['frame_s'] / first:.2f} | {row['process_mib']:.0f} | {row['gpu_mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
