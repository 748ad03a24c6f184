"""`imcnet pretrain`: a backbone trained on labelled images, where ImageNet's weights cannot be had."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import training_options as options
from service.errors import Misconfigured

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset


def pretrain(
    out: Annotated[
        Path, typer.Option(help="Folder of the run; if it holds one, that goes on where it stopped.")
    ],
    val: Annotated[list[Path], typer.Option(help="Images to validate with: folder or files, as the others.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of images of any size, in one folder a class.")
    ] = None,
    packed: Annotated[
        list[Path] | None,
        typer.Option(help="npz file of encoded images of one size; give it again for more files."),
    ] = None,
    backbone: Annotated[options.ResNet, typer.Option(help="What is trained.")] = "resnet18",
    size: Annotated[
        int | None, typer.Option(min=32, help="Side that the images of a folder are brought to; default: 64.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often each image is seen.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch, of all processes.")] = 128,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak of its course.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints: an interruption costs at most these.")
    ] = 250,
    device: options.DeviceOption = "auto",
    workers: options.WorkersOption = 4,
) -> None:
    """Train a backbone to tell classes apart; the result is OUT/backbone.safetensors, for --backbone-weights.

    The same command again goes on where the run was interrupted, and ends with the same weights.
    """
    from model.segmenter import resolve_device
    from model.training.pretrain import BACKBONE_NAME, PretrainConfig, Pretraining
    from model.training.processes import joined, rank

    if (images is None) == (not packed):
        raise Misconfigured("Give either --images or --packed.")
    data = _folders(images, val, size or 64) if images else _packed(packed or [], val)
    if size not in (None, data.size):
        raise Misconfigured(f"The packed images are {data.size} pixels wide; --size is for folders.")
    config = PretrainConfig(
        backbone=backbone,
        size=data.size,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        save_every=save_every,
        seed=seed,
    )
    with joined(resolve_device(device)) as own_device:
        run = Pretraining(
            config,
            data.train,
            data.val,
            classes=data.classes,
            folder=out,
            device=own_device,
            workers=workers,
        )
        accuracy = run.run()
        if rank() == 0:
            typer.echo(f"{out / BACKBONE_NAME}: right about {100 * accuracy:.1f} % of the images of --val")


@dataclass(frozen=True)
class _Data:
    train: "Dataset[tuple[Tensor, int]]"
    val: "Dataset[tuple[Tensor, int]]"
    classes: int
    size: int


def _folders(images: Path, val: Sequence[Path], size: int) -> _Data:
    from model.training.labelled_images import image_folder

    if len(val) != 1:
        raise Misconfigured("Beside --images, --val must be one folder.")
    for folder in (images, *val):
        if not folder.is_dir():
            raise Misconfigured(f"There is no folder {folder}.")
    train, validation = image_folder(images, size), image_folder(val[0], size)
    if train.classes != validation.classes:
        raise Misconfigured(f"{images} and {val[0]} must hold the same classes, as folders.")
    return _Data(train, validation, len(train.classes), size)


def _packed(files: Sequence[Path], val: Sequence[Path]) -> _Data:
    from model.training.labelled_images import PackedImages

    train, validation = PackedImages(files), PackedImages(val)
    if validation.classes > train.classes:
        raise Misconfigured(f"There are {train.classes} classes to train on, {validation.classes} in --val.")
    return _Data(train, validation, train.classes, train.images.shape[-1])
