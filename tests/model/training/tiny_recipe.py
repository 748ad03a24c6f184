"""A recipe of seconds on rendered scenes: all that a long one has, small."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model.config import usual_config
from model.training.presets import RECIPES, Phase, Recipe
from model.training.recipe import RecipeData, RecipeRun
from model.training.samples import Sample
from model.weights import WeightsInfo
from tests.training_data import RenderedWindows

STEPS = 3
SIZES = (32, 64)


@dataclass
class Scenes:
    """Windows of rendered scenes in both sizes, varied by noise that the generator draws."""

    seeds: Sequence[int]
    num_frames: int = 3

    def __post_init__(self) -> None:
        self._sources = {
            size: RenderedWindows(self.seeds, size=size, num_frames=self.num_frames) for size in SIZES
        }

    @property
    def names(self) -> Sequence[str]:
        return self._sources[SIZES[0]].names

    def __len__(self) -> int:
        return len(self.seeds)

    def sample(self, index: int, rng: np.random.Generator, size: int) -> Sample:
        sample = self._sources[size].sample(index, rng, size)
        noise = torch.from_numpy(rng.integers(0, 20, sample.frames.shape, dtype=np.uint8))
        return replace(sample, frames=sample.frames // 2 + noise)


def _tiny(phase: Phase) -> Phase:
    """A phase of the shipped recipe, cut down to a few steps of a sample of each kind."""
    return replace(
        phase,
        steps=STEPS,
        sizes=SIZES,
        windows_per_step=min(1, phase.windows_per_step),
        stills_per_step=min(1, phase.stills_per_step),
        windows=phase.windows[:1],
        images=phase.images[:1],
        validation_size=32,
        cue_dropout=0.5 * bool(phase.cue_dropout),
        save_every=2,
        validate_every=2,
    )


RECIPE = Recipe(
    usual_config("efficientnet_lite0"), tuple(_tiny(phase) for phase in RECIPES["shipped"].phases)
)


def recipe_run(
    folder: Path, start: Path | None, *, recipe: Recipe = RECIPE, first: str | None = None
) -> RecipeRun:
    data = RecipeData(
        {"davis16": Scenes([0, 1]), "hand_stills": Scenes([2, 3], num_frames=1)}, held_out=Scenes([4, 5])
    )
    info = WeightsInfo("tiny", recipe.network, trained=True, provenance="a test", licence="CC0-1.0")
    return RecipeRun(
        "tiny",
        recipe,
        data,
        info=info,
        folder=folder,
        device=torch.device("cpu"),
        start=start,
        first=first,
    )
