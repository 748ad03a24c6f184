"""`imcnet ablate`: rows of the paper's tables, trained under one budget, beside the paper's figures."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model.evaluation import davis, paper
from service.cli import training_options as options
from service.errors import Misconfigured

if TYPE_CHECKING:
    from model.training.ablation import RowFigures

Document = dict[str, Any]


def ablate(
    out: Annotated[Path, typer.Option(help="Folder of the runs; what it holds is not made again.")],
    steps: Annotated[int, typer.Option(min=2, help="Of each row, both stages together.")],
    davis16: Annotated[Path, typer.Option(help="Folder of DAVIS-2016; rows are measured on its val.")],
    rows: Annotated[str | None, typer.Option(help="Names with commas between them; default: all.")] = None,
    first: Annotated[str, typer.Option(help="Preset of the first stage.")] = "stage1",
    second: Annotated[str, typer.Option(help="Preset of the second stage.")] = "stage2",
    backbone: Annotated[options.ResNet, typer.Option(help="The same for all rows.")] = "resnet101",
    backbone_weights: options.BackboneWeightsOption = "imagenet",
    youtube_vos: options.YoutubeVosOption = None,
    single_object_list: options.SingleObjectListOption = None,
    youtube_objects: options.YoutubeObjectsOption = None,
    duts: options.DutsOption = None,
    size: options.SizeOption = None,
    batch_size: options.BatchSizeOption = None,
    image_batches: options.ImageBatchesOption = None,
    seed: options.SeedOption = None,
    precision: options.PrecisionOption = None,
    save_every: options.SaveEveryOption = None,
    sequences: Annotated[
        str | None, typer.Option(help="Measure on these only; names with commas between them.")
    ] = None,
    device: options.DeviceOption = "auto",
    workers: options.WorkersOption = 4,
    preload: options.PreloadOption = False,
) -> None:
    """Train rows of the paper's tables I and II, all for as many steps; measure J and F on DAVIS-2016 val.

    The figures go to OUT/ablation.json too. The same command again goes on where it was interrupted; with
    other --rows it adds these.
    """
    from model.datasets import davis16 as list_davis16
    from model.segmenter import resolve_device
    from model.training.ablation import Ablation, share_steps
    from model.training.sources import Sources
    from model.variants import ROWS

    if "LOCAL_RANK" in os.environ:
        raise Misconfigured("imcnet ablate trains in one process; torchrun is for imcnet train.")
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    names = _names(rows, ROWS, what="row")
    stages = tuple(
        options.preset(
            preset,
            steps=part,
            size=size or options.preset(first).size,  # one for both, which is measured at too
            batch_size=batch_size,
            image_batches=image_batches,
            seed=seed,
            precision=precision,
            save_every=save_every,
            validate_every=part,
        )
        for preset, part in zip((first, second), share_steps(steps), strict=True)
    )
    roots = options.dataset_roots(
        davis16=davis16, youtube_vos=youtube_vos, youtube_objects=youtube_objects, duts=duts
    )
    listed = {sequence.name: sequence for sequence in list_davis16(davis16, "val")}
    measured = [listed[name] for name in _names(sequences, listed, what="sequence")]
    ablation = Ablation(
        (stages[0], stages[1]),
        Sources(roots, ROWS["full"].config, stages[0], single_object_list, preload),
        measured,
        backbone=backbone,
        backbone_weights=options.backbone_start(backbone_weights or "imagenet"),
        folder=out,
        device=resolve_device(device),
        workers=workers,
    )
    document: Document = {
        "presets": [first, second],
        "steps": [stage.steps for stage in stages],
        "input_size": stages[0].size,
        "backbone": backbone,
        "sequences": [sequence.name for sequence in measured],
        "rows": {},
    }
    document["notes"] = list(_notes(document))
    for name in names:
        typer.echo(f"Row {name} …")
        document["rows"][name] = _figures(ablation.run(name))
        (out / "ablation.json").write_text(json.dumps(document, indent=2) + "\n")
    typer.echo(_render(document))


def _names(given: str | None, known: Iterable[str], *, what: str) -> list[str]:
    """Split names at commas; all that are known if none are given.

    Raises:
        Misconfigured: One is not known.
    """
    known = list(known)
    names = known if given is None else list(dict.fromkeys(name.strip() for name in given.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise Misconfigured(f"There is no {what} {', '.join(unknown)}; there are {', '.join(known)}.")
    return names


def _figures(row: "RowFigures") -> Document:
    """Ours and the paper's, as fractions of 1."""
    theirs = paper.DAVIS16_VAL[row.row]
    return {
        "j_mean": row.j_mean,
        "f_mean": row.f_mean,
        "paper": {"j_mean": theirs.j_mean / 100, "f_mean": theirs.f_mean / 100},
    }


def _notes(document: Document) -> Iterator[str]:
    """What keeps the figures from being comparable with the paper's; differences between rows remain so."""
    if document["steps"] != [200_000, 155_000] or document["presets"] != ["stage1", "stage2"]:
        stages = zip(document["steps"], document["presets"], strict=True)
        ours = " and ".join(f"{steps:,} of {preset}" for steps, preset in stages)
        yield f"the paper's steps are 200,000 of stage1 and 155,000 of stage2, ours {ours}."
    if document["backbone"] != paper.BACKBONE:
        yield f"the paper's backbone is {paper.BACKBONE}, ours {document['backbone']}."
    if document["input_size"] != paper.INPUT_SIZES["davis16"]:
        yield f"the paper's input size is {paper.INPUT_SIZES['davis16']}, ours {document['input_size']}."
    if len(document["sequences"]) < davis.SEQUENCES["val"]:
        yield (
            f"{len(document['sequences'])} of the {davis.SEQUENCES['val']} sequences were measured; "
            f"the paper's figures are those of all."
        )


def _render(document: Document) -> str:
    """Lay the figures out as a table, in percent; the differences are those of mean J to the full network."""
    full = document["rows"].get("full")
    lines = [
        "DAVIS-2016 val, in percent",
        "",
        f"{'':<15}{'ours':^14}{'paper':^14}" + ("" if full is None else f"{'J less full':^16}"),
        f"{'':<15}" + f"{'J':>7}{'F':>7}" * 2 + ("" if full is None else f"{'ours':>8}{'paper':>8}"),
    ]
    for name, ours in document["rows"].items():
        theirs = ours["paper"]
        shares = (ours["j_mean"], ours["f_mean"], theirs["j_mean"], theirs["f_mean"])
        line = f"{name:<15}" + "".join(f"{100 * share:7.1f}" for share in shares)
        if full is not None:
            line += f"{100 * (ours['j_mean'] - full['j_mean']):+8.1f}"
            line += f"{100 * (theirs['j_mean'] - full['paper']['j_mean']):+8.1f}"
        lines.append(line)
    return "\n".join([*lines, "", *(f"Note: {note}" for note in document["notes"])]).rstrip()
