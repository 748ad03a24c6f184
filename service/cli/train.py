"""`imcnet train`: a recipe, or one stage of the paper's training, from its data to a weights file."""

import contextlib
import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import training_options as options
from service.cli.train_recipe import train_recipe
from service.errors import Misconfigured

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from model.imcnet import IMCNetConfig
    from model.training.presets import TrainConfig
    from model.training.starts import BackboneWeights

_OF_RECIPES = frozenset({"data", "cache", "first", "minutes"})
_OF_PRESETS = frozenset(
    {"row", "backbone", "backbone_weights", "davis16", "youtube_vos", "single_object_list", "youtube_objects"}
    | {"duts", "steps", "size", "batch_size", "image_batches", "seed", "preload"}
)


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Run folder; a run that it holds is resumed.")],
    recipe: Annotated[
        str | None, typer.Option(help="shipped: all phases, from ImageNet's weights to the shipped weights.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="stage1 or stage2: a stage of the paper's training.")
    ] = None,
    data: options.DataOption = None,
    cache: options.CacheOption = None,
    first: options.FromOption = None,
    minutes: options.MinutesOption = None,
    row: Annotated[
        str | None,
        typer.Option(
            "--row", "--variant", help="Row of the paper's ablations: no_acm, l2, no_joint …; default: full."
        ),
    ] = None,
    backbone: Annotated[options.Backbone | None, typer.Option(help="Default: resnet101.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Weights file to start from, such as that of an earlier stage.")
    ] = None,
    backbone_weights: options.BackboneWeightsOption = None,
    davis16: options.DavisOption = None,
    youtube_vos: options.YoutubeVosOption = None,
    single_object_list: options.SingleObjectListOption = None,
    youtube_objects: options.YoutubeObjectsOption = None,
    duts: options.DutsOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Batches; the learning-rate schedule stretches to them.")
    ] = None,
    size: options.SizeOption = None,
    batch_size: options.BatchSizeOption = None,
    image_batches: options.ImageBatchesOption = None,
    seed: options.SeedOption = None,
    precision: options.PrecisionOption = None,
    save_every: options.SaveEveryOption = None,
    validate_every: options.ValidateEveryOption = None,
    device: options.DeviceOption = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that make samples, for each device. Default: 0 for a recipe, 4 for a preset.",
        ),
    ] = None,
    preload: options.PreloadOption = False,
    threads: options.ThreadsOption = None,
    nice: options.NiceOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the weights, shown beside results.")] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            help="Terms of the weights, as an SPDX identifier. "
            "Default: CC-BY-NC-4.0 for a recipe, else unknown."
        ),
    ] = None,
    provenance: Annotated[
        str | None, typer.Option(help="How and on what they were trained; default: what is known here.")
    ] = None,
) -> None:
    """Train the network with a recipe or with a preset; results go to OUT.

    Values that are not given are those of the recipe or preset. The same command again resumes an interrupted
    run, which ends with the same weights as if it had not been interrupted. Several GPUs, with a preset:
    torchrun --nproc-per-node N -m service.cli train …
    """
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    if recipe is not None and preset is None:
        _refuse(context, _OF_PRESETS, "--preset")
        _use_machine(threads or 1, 19 if nice is None else nice)
        train_recipe(
            recipe,
            data=data,
            cache=cache or out.parent / "cache",
            out=out,
            init=init,
            first=first,
            minutes=minutes,
            device=device,
            workers=workers or 0,
            precision=precision,
            save_every=save_every,
            validate_every=validate_every,
            weights_name=name,
            licence=licence or "CC-BY-NC-4.0",
            provenance=provenance,
        )
        return
    if preset is None or recipe is not None:
        raise Misconfigured("Give either --recipe or --preset.")
    _refuse(context, _OF_RECIPES, "--recipe")
    _use_machine(threads, nice)
    from model.segmenter import resolve_device
    from model.training.checkpoint import claim_folder
    from model.training.processes import joined, rank
    from model.training.sources import Sources
    from model.training.starts import describe_start, new_network
    from model.training.trainer import WEIGHTS_NAME, Training
    from model.weights import WeightsInfo, load_weights

    stage = _stage(
        preset,
        row,
        steps=steps,
        size=size,
        batch_size=batch_size,
        image_batches=image_batches,
        seed=seed,
        precision=precision,
        save_every=save_every,
        validate_every=validate_every,
    )
    start = _start(init, backbone_weights)
    started_from = describe_start(start)
    config = _network_config(row, backbone, init)
    info = WeightsInfo(
        name=name or f"imcnet-{config.backbone}" + (f"-{row}" if row else ""),
        config=config,
        trained=True,
        provenance=provenance or f"{preset}, {stage.steps} steps at {stage.size} pixels, from {started_from}",
        licence=licence or "unknown",
        input_size=stage.size,
    )
    roots = options.dataset_roots(
        davis16=davis16, youtube_vos=youtube_vos, youtube_objects=youtube_objects, duts=duts
    )
    with joined(resolve_device(device)) as own_device:
        sources = Sources(roots, config, stage, single_object_list, preload)
        network = load_weights(init)[0] if init else new_network(config, start, seed=stage.seed)
        claim_folder(out, {"start": started_from})
        run = Training(
            network,
            stage,
            sources.data(),
            info=info,
            folder=out,
            device=own_device,
            workers=4 if workers is None else workers,
        )
        with _events(out / "events", run.step, first=rank() == 0) as events:
            run.run(events=events)
        if rank() == 0:
            typer.echo(f"{out / WEIGHTS_NAME}: J {run.history[-1]['j']:.3f} on held-out windows")


def _refuse(context: typer.Context, names: Collection[str], needed: str) -> None:
    """Raises: Misconfigured: The command line gives an option that belongs to ``needed``."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        # By name: typer 0.25 has a private copy of click, whose enumeration is another one than click's.
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise Misconfigured(f"{parameter.opts[0]} needs {needed}.")


def _use_machine(threads: int | None, nice: int | None) -> None:
    """Limit threads and priority of this process; a priority that is already lower stays."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if nice is not None:
        os.nice(max(0, nice - os.nice(0)))


def _stage(preset: str, row: str | None, **overrides: object) -> "TrainConfig":
    """The preset, changed by what was given and by what the row leaves out of training."""
    from model.variants import ROWS

    if row is not None and row not in ROWS:
        raise Misconfigured(f"The paper has no row {row}; there are {', '.join(ROWS)}.")
    stage = options.preset(preset, **overrides)
    training = "both" if row is None else ROWS[row].training
    if training == "stage1_only" and preset == "stage2":
        raise Misconfigured(f"Row {row} ends with stage1.")
    return replace(stage, images=()) if training == "no_joint" else stage


def _start(init: Path | None, backbone_weights: str | None) -> "BackboneWeights":
    """What training starts from: ``init``, or the weights of a backbone."""
    if init is not None and backbone_weights is not None:
        raise Misconfigured("Give --init or --backbone-weights, not both: --init holds a backbone.")
    return init or options.backbone_start(backbone_weights or "imagenet")


def _network_config(row: str | None, backbone: options.Backbone | None, init: Path | None) -> "IMCNetConfig":
    """Raises: Misconfigured: ``init`` is the weights of another network than is asked for."""
    from model.backbone import imagenet_normalisation
    from model.config import usual_config
    from model.variants import ROWS
    from model.weights import read_info

    if init is None:
        backbone = backbone or "resnet101"
        if row is None:
            return usual_config(backbone)
        return replace(ROWS[row].config, backbone=backbone, normalisation=imagenet_normalisation(backbone))
    config = read_info(init).config
    wanted = replace(config if row is None else ROWS[row].config, backbone=backbone or config.backbone)
    if wanted != config:
        raise Misconfigured(f"{init} holds {config}, but {wanted} is to be trained.")
    return config


@contextlib.contextmanager
def _events(folder: Path, step: int, *, first: bool) -> "Iterator[SummaryWriter | None]":
    """Event files for TensorBoard, where that is installed; what they tell of later steps is dropped."""
    if not first:
        yield None
        return
    if find_spec("tensorboard") is None:
        typer.echo("imcnet: no event files are written: pip install 'imcnet[train]'", err=True)
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=step + 1) as writer:
        yield writer
