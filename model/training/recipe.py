"""Trains the phases of a recipe in one run folder; a run may be interrupted anywhere and resumes exactly."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.errors import TrainingError
from model.imcnet import IMCNet
from model.training.checkpoint import claim_folder
from model.training.learning_curve import draw_learning_curve
from model.training.presets import Phase, Recipe
from model.training.recipe_report import summary
from model.training.samples import Joined, Mixture, SampleSource
from model.training.starts import describe_start, measure_whitening, new_network
from model.training.trainer import (
    CHECKPOINT_NAME,
    WEIGHTS_NAME,
    RunFiles,
    Training,
    TrainingData,
    is_finished,
    read_history,
)
from model.training.validation import HeldOut
from model.variants import build_network
from model.weights import WeightsInfo, load_weights

CURVE_NAME = "learning-curve.png"
SUMMARY_NAME = "summary.txt"


@dataclass(frozen=True)
class RecipeData:
    """Data of a recipe.

    Args:
        sources: Sources of windows and stills, by the names that phases use.
        held_out: Sequences for validation. No source holds a frame of them.
    """

    sources: Mapping[str, SampleSource]
    held_out: HeldOut


class RecipeRun:
    """Trains a recipe in a folder, with a subfolder for each phase beside best weights, log and curve.

    Args:
        info: Description for the weights files; each phase adds its steps to the provenance.
        start: Weights file of the recipe's network to start from. None: ImageNet's weights for the backbone,
            measured whitening, and random weights for all other parts.
        first: Phase to begin with; earlier ones are skipped. None: the recipe's first phase.
        workers: Processes that make samples; 0 makes them in this process.

    Raises:
        CheckpointError: The folder belongs to another run.
        TrainingError: There is no such phase, phases are skipped without a start, or the start holds another
            network.
        WeightsError: The start cannot be read.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        data: RecipeData,
        *,
        info: WeightsInfo,
        folder: Path,
        device: torch.device,
        start: Path | None = None,
        first: str | None = None,
        workers: int = 0,
    ) -> None:
        self.recipe, self.data, self.info = recipe, data, info
        self.folder, self.device, self.workers = folder, device, workers
        self.phases = phases_from(recipe, first)
        if len(self.phases) < len(recipe.phases) and start is None:
            raise TrainingError(f"phase {first} needs weights to start from")
        self._start = start
        self._started_from = describe_start(start or "imagenet")
        self._recipe_name = name
        claim_folder(folder, {"recipe": name, "start": self._started_from, "first": self.phases[0].name})

    def run(self, *, seconds: float | None = None) -> bool:
        """Train every unfinished phase; write curve and summary after each.

        Args:
            seconds: Stop early after about this long; the next run resumes.

        Returns:
            Whether all phases are finished.

        Raises:
            DatasetError: A picture cannot be read.
            TrainingError: Masks or gradients are no longer finite.
        """
        end = None if seconds is None else time.monotonic() + seconds
        for place, phase in enumerate(self.phases):
            if is_finished(self.folder / phase.name, phase.steps):
                continue
            training = self._training(place)
            training.run(seconds=None if end is None else max(0.0, end - time.monotonic()))
            self._report()
            if not training.finished:
                return False
        self._report()
        return True

    def _training(self, place: int) -> Training:
        phase, folder = self.phases[place], self.folder / self.phases[place].name
        resumed = (folder / CHECKPOINT_NAME).exists()
        # A checkpoint replaces all weights, so the start need not be loaded.
        network = build_network(self.recipe.network) if resumed else self._network(place)
        earlier = [read_history(self.folder / done.name) for done in self.phases[:place]]
        best_j = max((entry["j"] for history in earlier for entry in history), default=RunFiles.best_j)
        return Training(
            network,
            phase,
            self._data(phase),
            info=self._info(place),
            folder=folder,
            device=self.device,
            run=RunFiles(self.folder, best_j),
            workers=self.workers,
        )

    def _network(self, place: int) -> IMCNet:
        """The network that a phase starts from."""
        if place:
            return load_weights(self.folder / self.phases[place - 1].name / WEIGHTS_NAME)[0]
        if self._start is not None:
            network, info = load_weights(self._start)
            if info.config != self.recipe.network:
                raise TrainingError(
                    f"{self._start} holds {info.config}, but the recipe trains {self.recipe.network}"
                )
            return network
        phase = self.phases[place]
        network = new_network(self.recipe.network, "imagenet", seed=phase.seed)
        measure_whitening(network, self._mixture(phase.images), seed=phase.seed)
        return network

    def _data(self, phase: Phase) -> TrainingData:
        windows, images = self._mixture(phase.windows), self._mixture(phase.images)
        return TrainingData(windows, images, validation=self.data.held_out)

    def _mixture(self, weights: Sequence[tuple[str, float]]) -> SampleSource:
        if not weights:
            return Joined([])
        return Mixture([(self.data.sources[name], weight) for name, weight in weights])

    def _info(self, place: int) -> WeightsInfo:
        steps = ", ".join(f"{phase.steps} steps of {phase.name}" for phase in self.phases[: place + 1])
        made_by = f"recipe {self._recipe_name}, {steps}, from {self._started_from}"
        return replace(
            self.info,
            provenance=f"{self.info.provenance}: {made_by}",
            input_size=self.phases[place].validation_size,
        )

    def _report(self) -> None:
        names = [phase.name for phase in self.phases]
        (self.folder / SUMMARY_NAME).write_text(summary(self.folder, names), encoding="utf-8")
        histories = {name: read_history(self.folder / name) for name in names}
        draw_learning_curve(histories).save(self.folder / CURVE_NAME)


def phases_from(recipe: Recipe, first: str | None) -> tuple[Phase, ...]:
    """The phases of a recipe from ``first`` on; None for all.

    Raises:
        TrainingError: The recipe has no such phase.
    """
    names = [phase.name for phase in recipe.phases]
    if first is None:
        return recipe.phases
    if first not in names:
        raise TrainingError(f"the recipe has no phase {first}; there are {', '.join(names)}")
    return recipe.phases[names.index(first) :]
