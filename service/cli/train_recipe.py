"""`imcnet train --recipe`: all phases of a recipe in one folder."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from service.errors import Misconfigured

if TYPE_CHECKING:
    from model.training.presets import Recipe


def train_recipe(
    name: str,
    *,
    data: Path | None,
    cache: Path,
    out: Path,
    init: Path | None,
    first: str | None,
    minutes: float | None,
    device: str,
    workers: int,
    precision: str | None,
    save_every: int | None,
    validate_every: int | None,
    weights_name: str | None,
    licence: str,
    provenance: str | None,
) -> None:
    """Train a recipe, or resume it, and print its summary.

    Args:
        data: Packed training data; its held-out sequences validate.
        cache: Folder for the decoded pictures.
        init: Weights file to start from.
        first: Phase to begin with; the earlier ones are skipped.
        minutes: Stop after about this many minutes.
        precision, save_every, validate_every: As in ``Phase``, for all phases. None: the recipe's.

    Raises:
        Misconfigured: There is no such recipe or folder, a value is not allowed, or torchrun started this.
    """
    from model.segmenter import resolve_device
    from model.training.packed import PackedData
    from model.training.recipe import SUMMARY_NAME, RecipeData, RecipeRun, phases_from
    from model.training.sources import held_out_windows, packed_sources
    from model.training.trainer import BEST_NAME
    from model.weights import WeightsInfo

    if "LOCAL_RANK" in os.environ:
        raise Misconfigured("A recipe trains in one process; torchrun is for --preset.")
    if data is None or not data.is_dir():
        raise Misconfigured(f"--recipe needs --data, a folder of training data; got {data}.")
    recipe = _recipe(name, precision=precision, save_every=save_every, validate_every=validate_every)
    phases_from(recipe, first)
    network = recipe.network
    pictures = PackedData(data, cache, side=recipe.largest_size)
    run = RecipeRun(
        name,
        recipe,
        RecipeData(
            packed_sources(pictures, num_frames=network.num_frames, strides=recipe.strides),
            held_out_windows(pictures, network.num_frames, network.frame_stride),
        ),
        info=WeightsInfo(
            name=weights_name or f"imcnet-{network.backbone}",
            config=network,
            trained=True,
            provenance=provenance or "trained with `imcnet train`",
            licence=licence,
        ),
        folder=out,
        device=resolve_device(device),
        start=init,
        first=first,
        workers=workers,
    )
    finished = run.run(seconds=None if minutes is None else 60 * minutes)
    typer.echo((out / SUMMARY_NAME).read_text())
    typer.echo(f"{out / BEST_NAME}" if finished else "Stopped before the end: the same command resumes.")


def _recipe(name: str, **overrides: object) -> "Recipe":
    """Raises: Misconfigured: There is no such recipe, or a value is not allowed."""
    from model.training.presets import RECIPES

    if name not in RECIPES:
        raise Misconfigured(f"There is no recipe {name}; there are {', '.join(RECIPES)}.")
    given = {field: value for field, value in overrides.items() if value is not None}
    try:
        phases = tuple(replace(phase, **given) for phase in RECIPES[name].phases)  # type: ignore[arg-type]
    except ValueError as error:
        raise Misconfigured(str(error)) from error
    return replace(RECIPES[name], phases=phases)
