"""`imcnet weights`: make, translate and look at weights files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from service.errors import Misconfigured

if TYPE_CHECKING:
    from model.backbone import BackboneName
    from model.imcnet import Variant

app = typer.Typer(no_args_is_help=True, help="Make, translate and look at weights files.")

NewFile = Annotated[Path, typer.Argument(metavar="OUT", help="File to write; it must not exist yet.")]
StrideOption = Annotated[int, typer.Option(help="Distance between the frames of a window.")]


@app.command("init")
def init(
    out: NewFile,
    backbone: Annotated[
        str, typer.Option(help="resnet18, resnet34, resnet50, resnet101 or resnet152.")
    ] = "resnet101",
    num_frames: Annotated[int, typer.Option(help="Frames in a window: 3, 5 or 7.")] = 3,
    frame_stride: StrideOption = 4,
    variant: Annotated[
        str, typer.Option(help="full, or an ablation: no_acm, no_key_encoder, fpn, regular_conv or no_tsc.")
    ] = "full",
    alignment_stages: Annotated[int, typer.Option(help="Stages of the alignment: 1 to 5.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed makes the same file.")] = 0,
) -> None:
    """Write random, untrained weights: for trying things out, not for masks."""
    from model.imcnet import IMCNetConfig
    from model.weights import init_weights

    _refuse_to_overwrite(out)
    try:
        config = IMCNetConfig(
            cast("BackboneName", backbone),
            num_frames,
            frame_stride,
            cast("Variant", variant),
            alignment_stages,
        )
    except ValueError as error:
        raise Misconfigured(str(error)) from error
    init_weights(out, config, seed)
    show(out)


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(metavar="IN", help="Checkpoint of the paper's authors.")],
    out: NewFile,
    name: Annotated[str, typer.Option(help="Name shown beside results.")] = "imcnet",
    licence: Annotated[str, typer.Option(help="Terms of the weights, as an SPDX identifier.")] = "unknown",
    frame_stride: StrideOption = 4,
) -> None:
    """Translate a checkpoint of the paper's authors; nothing that it holds is executed."""
    from model.weights import import_checkpoint

    _refuse_to_overwrite(out)
    import_checkpoint(checkpoint, out, name=name, licence=licence, frame_stride=frame_stride)
    show(out)


@app.command("show")
def show(file: Annotated[Path, typer.Argument(help="Weights file.")]) -> None:
    """Print what a weights file says of itself, and its checksum, as JSON."""
    from model.weights import file_sha256, read_info

    facts = {"file": str(file), **asdict(read_info(file)), "sha256": file_sha256(file)}
    typer.echo(json.dumps(facts, indent=2))


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise Misconfigured(f"{path} exists already; weights are never overwritten.")
    if not path.parent.is_dir():
        raise Misconfigured(f"There is no folder {path.parent}.")
