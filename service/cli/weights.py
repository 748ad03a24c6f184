"""`imcnet weights`: make, translate and look at weights files."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from service.errors import Misconfigured

if TYPE_CHECKING:
    from model.backbone import BackboneName
    from model.config import IMCNetConfig

app = typer.Typer(no_args_is_help=True, help="Make, translate and look at weights files.")

NewFile = Annotated[Path, typer.Argument(metavar="OUT", help="File to write; it must not exist yet.")]
_NOT_THE_PAPERS = "Default: with an EfficientNet-Lite; the paper's network has none."
StrideOption = Annotated[int, typer.Option(help="Distance between the frames of a window.")]


@app.command("init")
def init(
    out: NewFile,
    backbone: Annotated[
        str,
        typer.Option(
            help="resnet18, resnet34, resnet50, resnet101, resnet152, efficientnet_lite0 or "
            "efficientnet_lite2."
        ),
    ] = "resnet101",
    num_frames: Annotated[int, typer.Option(help="Frames in a window: 3, 5 or 7.")] = 3,
    frame_stride: StrideOption = 4,
    variant: Annotated[
        str | None,
        typer.Option(
            help="full, or an ablation: no_acm, no_key_encoder, fpn, regular_conv or no_tsc. "
            "Default: full on a ResNet, else no_acm."
        ),
    ] = None,
    alignment_stages: Annotated[
        int | None, typer.Option(help="Stages of the alignment: 0 to 5. Default: 4 on a ResNet, else 0.")
    ] = None,
    normalisation: Annotated[
        str | None,
        typer.Option(
            help="Normalisation of images: imagenet, or centred, which is (x - 127) / 128. Default: that of "
            "the backbone's ImageNet weights."
        ),
    ] = None,
    whitening: Annotated[bool | None, typer.Option(help=f"Whitened backbone maps. {_NOT_THE_PAPERS}")] = None,
    motion_cue: Annotated[
        bool | None, typer.Option(help=f"Motion against the camera, for the fusion. {_NOT_THE_PAPERS}")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same file.")] = 0,
) -> None:
    """Write random, untrained weights: for trying things out, not for masks."""
    from model.weights import init_weights

    _refuse_to_overwrite(out)
    config = _config(
        backbone,
        num_frames=num_frames,
        frame_stride=frame_stride,
        variant=variant,
        alignment_stages=alignment_stages,
        normalisation=normalisation,
        whitening=whitening,
        motion_cue=motion_cue,
    )
    init_weights(out, config, seed)
    show(out)


def _config(backbone: str, **options: Any) -> "IMCNetConfig":
    """The usual network on a backbone, changed by the options that are not None."""
    from model.config import usual_config

    given = {name: value for name, value in options.items() if value is not None}
    try:
        return replace(usual_config(cast("BackboneName", backbone)), **given)
    except ValueError as error:
        raise Misconfigured(str(error)) from error


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
