"""What `imcnet evaluate` does with weights: the masks of a dataset's frames, and how long they take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.cli.settings import require_weights
from service.jobs import Quality
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    import torch

    from model.datasets import VideoSequence
    from model.segmenter import Segmenter
    from model.weights import WeightsInfo

SegmentationPath = Literal["windows", "still"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The network that made the masks, and where it ran.

    Args:
        sha256: Of the weights file.
        hardware: Name of the GPU, or threads of the CPU.
        seconds_per_mask: From frames in memory to masks in memory.
    """

    info: "WeightsInfo"
    sha256: str
    device: str
    hardware: str
    input_size: int
    quality: Quality
    path: SegmentationPath
    seconds_per_mask: float


def segment_to(
    folder: Path,
    sequences: Sequence[tuple["VideoSequence", Sequence[int]]],
    settings: WorkerSettings,
    quality: Quality,
    path: SegmentationPath,
) -> Run:
    """Write the network's masks of the frames named beside each sequence, laid out as ``StoredMasks`` reads.

    Raises:
        Misconfigured: The weights file is not there.
        ModelError: Weights, device or dataset cannot be used.
    """
    from tqdm import tqdm

    from model.evaluation.predictions import SegmentedMasks, StoredMasks
    from model.weights import file_sha256, read_info

    weights = require_weights(settings)
    segmenter = _load_segmenter(weights, settings, quality, path)
    masks, stored = SegmentedMasks(segmenter, quality=quality), StoredMasks(folder)
    total = sum(len(frames) for _, frames in sequences)
    with tqdm(total=total, desc="Segmenting", unit="frame", disable=None) as bar:
        for sequence, frames in sequences:
            for index, mask in zip(frames, masks.masks(sequence, frames), strict=True):
                stored.save(sequence, index, mask)
                bar.update()
    return Run(
        info=read_info(weights),
        sha256=file_sha256(weights),
        device=str(segmenter.device),
        hardware=_hardware(segmenter.device),
        input_size=segmenter.input_size,
        quality=quality,
        path=path,
        seconds_per_mask=masks.seconds_per_mask,
    )


def _load_segmenter(
    weights: Path, settings: WorkerSettings, quality: Quality, path: SegmentationPath
) -> "Segmenter":
    from model.engines import load_segmenter, load_still_segmenter

    if path == "still":
        return load_still_segmenter(weights, device=settings.device, input_size=settings.input_size)
    return load_segmenter(
        weights,
        quality,
        device=settings.device,
        input_size=settings.input_size,
        exact_backend=settings.exact_backend,
        graphs=settings.graphs,
    )


def _hardware(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"threads: {torch.get_num_threads()}"
