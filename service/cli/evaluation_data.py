"""Data for `imcnet evaluate`: sources of sequences, the choice among them, and attributes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ValidationError

from service.errors import Misconfigured

if TYPE_CHECKING:
    from model.evaluation.sources import SequenceSource

Dataset = Literal["davis16", "motion", "youtube-objects"]
Split = Literal["train", "val", "held-out"]


class _DavisEntry(BaseModel):
    name: str
    attributes: list[str]


class _DavisDatabase(BaseModel):
    """What is used of DAVIS's db_info.yaml."""

    sequences: list[_DavisEntry]


def open_source(dataset: Dataset, root: Path, split: Split) -> "SequenceSource":
    """Raises: DatasetError: ``root`` does not hold the data set."""
    from model.datasets import youtube_objects
    from model.evaluation.sources import FolderSequences, davis16_source

    if dataset == "davis16":
        return davis16_source(root, split)
    if dataset == "youtube-objects":
        return FolderSequences(youtube_objects(root))
    from model.evaluation.motion_set import MotionSet  # it renders with torch, which nothing else here needs

    return MotionSet(root)


def choose(listed: Sequence[str], given: str | None) -> list[str]:
    """The names in the comma-separated list ``given``; None for all.

    Raises:
        Misconfigured: One is not listed.
    """
    if given is None:
        return list(listed)
    wanted = list(dict.fromkeys(name.strip() for name in given.split(",")))
    if unknown := [name for name in wanted if name not in listed]:
        raise Misconfigured(f"No such sequence: {', '.join(unknown)}; there are {', '.join(listed)}.")
    return wanted


def read_attributes(path: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """The attributes of each sequence.

    Raises:
        Misconfigured: The file is none of DAVIS's, or lacks a sequence.
    """
    import yaml

    try:
        database = _DavisDatabase.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise Misconfigured(
            f"{path} must list `sequences` in YAML, each with `name` and `attributes`, as DAVIS's db_info."
        ) from error
    attributes_of = {entry.name: entry.attributes for entry in database.sequences}
    if missing := [name for name in names if name not in attributes_of]:
        raise Misconfigured(f"{path} does not know the sequence {', '.join(missing)}.")
    return attributes_of
