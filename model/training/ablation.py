"""The rows of the paper's tables I and II, all trained under one budget and measured alike."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from model.backbone import BackboneName
from model.datasets import VideoSequence
from model.evaluation import davis
from model.evaluation.predictions import SegmentedMasks
from model.evaluation.scores import Figures
from model.imcnet import IMCNetConfig
from model.segmenter import Segmenter
from model.training.checkpoint import claim_folder, replacing
from model.training.presets import PRESETS, TrainConfig
from model.training.sources import Sources
from model.training.starts import BackboneWeights, describe_start, new_network
from model.training.trainer import WEIGHTS_NAME, Training, is_finished
from model.variants import ROWS, Row
from model.views import Quality
from model.weights import WeightsInfo, load_weights

Stages = tuple[TrainConfig, ...]


@dataclass(frozen=True)
class RowFigures:
    """What a row reached: mean J and mean F over sequences, in [0, 1]."""

    row: str
    j_mean: float
    f_mean: float


def share_steps(steps: int) -> tuple[int, int]:
    """Give both stages their part of ``steps``, 200 to 155 as in the paper.

    Raises:
        ValueError: They are fewer than two.
    """
    if steps < 2:
        raise ValueError(f"two stages need at least 2 steps, got {steps}")
    first, second = PRESETS["stage1"].steps, PRESETS["stage2"].steps
    share = min(max(1, round(steps * first / (first + second))), steps - 1)
    return share, steps - share


def stages_of(row: Row, stages: tuple[TrainConfig, TrainConfig]) -> Stages:
    """The stages that a row trains, of the two of the full training."""
    match row.training:
        case "both":
            return stages
        case "stage1_only":
            return stages[:1]
        case "no_joint":
            return tuple(replace(stage, images=()) for stage in stages)


class Ablation:
    """Trains rows from the same start on the same data for as many steps, and measures them on DAVIS-2016.

    Rows that have a stage in common train it once. What the folder holds is not made again: for each row,
    ``<row>/stage1`` and ``<row>/stage2`` as ``Training`` leaves them, and ``<row>/figures.json``.

    Args:
        stages: Both, as the full network trains them.
        sources: Where pictures come from; its network and configuration are replaced by each row's own.
        sequences: What the rows are measured on, at the size that they are trained with.

    Raises:
        CheckpointError: The folder is that of other stages, or of another start.
    """

    def __init__(
        self,
        stages: tuple[TrainConfig, TrainConfig],
        sources: Sources,
        sequences: Sequence[VideoSequence],
        *,
        backbone: BackboneName,
        backbone_weights: BackboneWeights,
        folder: Path,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self.stages, self.sources, self.sequences = stages, sources, sequences
        self.backbone, self.backbone_weights = backbone, backbone_weights
        self.folder, self.device, self.workers = folder, device, workers
        self._start = describe_start(backbone_weights)
        settings = {"stages": [asdict(stage) for stage in stages], "backbone": backbone, "start": self._start}
        claim_folder(folder, settings)

    def run(self, name: str) -> RowFigures:
        """Train and measure a row of ``ROWS``, or go on where that was interrupted.

        Raises:
            DatasetError: A data set is missing or cannot be read.
            TrainingError: Training cannot go on.
            WeightsError: The backbone's weights cannot be used.
        """
        path = self.folder / name / "figures.json"
        sequences = [sequence.name for sequence in self.sequences]
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["sequences"] == sequences:
                return RowFigures(name, stored["j_mean"], stored["f_mean"])
        row = ROWS[name]
        weights = self._weights(row, stages_of(row, self.stages))
        figures = self._measure(weights, row.quality)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps({**figures, "sequences": sequences}, indent=1))
        return RowFigures(name, **figures)

    def _weights(self, row: Row, stages: Stages) -> Path:
        """The weights that a row has after these stages; what is missing of them is trained."""
        owner = self._first_row(row.config, stages)
        folder = self.folder / owner / f"stage{len(stages)}"
        if not is_finished(folder, stages[-1].steps):
            config = replace(row.config, backbone=self.backbone)
            if len(stages) == 1:
                network = new_network(config, self.backbone_weights, seed=stages[0].seed)
            else:
                network, _ = load_weights(self._weights(row, stages[:-1]))
            provenance = f"ablation: {sum(stage.steps for stage in stages)} steps from {self._start}"
            Training(
                network,
                stages[-1],
                replace(self.sources, network=config, config=stages[-1]).data(),
                info=WeightsInfo(
                    name=f"imcnet-{self.backbone}-{owner}",
                    config=config,
                    trained=True,
                    provenance=provenance,
                    licence="unknown",
                    input_size=stages[-1].size,
                ),
                folder=folder,
                device=self.device,
                workers=self.workers,
            ).run()
        return folder / WEIGHTS_NAME

    def _first_row(self, config: IMCNetConfig, stages: Stages) -> str:
        """Of all rows that have these stages in common, the first: in its folder they are."""
        return next(
            name
            for name, row in ROWS.items()
            if row.config == config and stages_of(row, self.stages)[: len(stages)] == stages
        )

    def _measure(self, weights: Path, quality: Quality) -> dict[str, float]:
        segmenter = Segmenter.load(weights, device=str(self.device))
        masks = SegmentedMasks(segmenter, quality=quality)
        progress = tqdm(self.sequences, desc="Measuring", unit="video", disable=None)
        figures = Figures.of([davis.score_sequence(masks, sequence) for sequence in progress])
        return {"j_mean": figures.j.mean, "f_mean": figures.f.mean}
