"""`imcnet evaluate`: J and F of the network, or of anyone's masks, on DAVIS-2016 and YouTube-Objects."""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import BaseModel, ValidationError

from service.cli import evaluation_report as report
from service.cli.evaluation_run import segment_to
from service.cli.serve import WeightsOption
from service.cli.settings import read_settings, require_weights
from service.errors import Misconfigured
from service.jobs import Quality
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from model.datasets import VideoSequence
    from model.evaluation.predictions import StoredMasks
    from model.evaluation.scores import SequenceScores
    from model.imcnet import IMCNetConfig

Split = Literal["train", "val"]

_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")


class _DavisEntry(BaseModel):
    name: str
    attributes: list[str]


class _DavisDatabase(BaseModel):
    """What is used of DAVIS's db_info.yaml."""

    sequences: list[_DavisEntry]


def evaluate(
    dataset: Annotated[report.Dataset, typer.Option(help="The benchmark.")],
    root: Annotated[Path, typer.Option(help="Folder of the dataset.")],
    split: Annotated[Split, typer.Option(help="Of DAVIS.")] = "val",
    weights: WeightsOption = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [IMCNET_DEVICE]")] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the square that frames are resized to [IMCNET_INPUT_SIZE]")
    ] = None,
    quality: Annotated[
        Quality, typer.Option(help="multi_scale looks at each frame nine times, as the paper's best row.")
    ] = "exact",
    results: Annotated[
        Path | None, typer.Option(help="Score the masks <sequence>/<frame>.png in this folder; no weights.")
    ] = None,
    save_masks: Annotated[
        Path | None, typer.Option(help="New folder for the network's masks, laid out as for --results.")
    ] = None,
    sequences: Annotated[
        str | None, typer.Option(help="Score these only; names with commas between them.")
    ] = None,
    attributes: Annotated[
        Path | None, typer.Option(help="DAVIS's db_info.yaml: figures by attribute too.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures, as fractions of 1.")
    ] = None,
    worst: Annotated[
        Path | None, typer.Option(help="Draw the worst frames beside their truth; .jpg or .png.")
    ] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Draw each sequence's best, median and worst frame; .jpg or .png.")
    ] = None,
    compare_paper: Annotated[
        bool, typer.Option("--compare-paper", help="Set the paper's figures beside ours.")
    ] = False,
    paper_row: Annotated[
        str | None, typer.Option(help="Compare with this row of the paper, not with the one that fits.")
    ] = None,
) -> None:
    """Measure how well masks fit the annotations of a benchmark: J, F and time per frame."""
    from model.evaluation.predictions import StoredMasks

    if results is not None:
        _refuse({"--weights": weights, "--device": device, "--input-size": input_size}, beside="--results")
        _refuse({"--save-masks": save_masks}, beside="--results")
    if dataset != "davis16":
        _refuse({"--attributes": attributes}, beside=f"--dataset {dataset}")
    _check_paths(results, save_masks, json_file, pictures=(worst, contact_sheet))
    listed = _list_sequences(dataset, root, split)
    chosen = _choose(listed, sequences)
    attributes_of = None if attributes is None else _read_attributes(attributes, chosen)
    settings = read_settings(WorkerSettings, weights=weights, device=device, input_size=input_size)
    row = None
    if compare_paper or paper_row is not None:
        row = _choose_row(dataset, paper_row, None if results else _config(settings), quality)

    with _folder(results or save_masks) as folder:
        run = None
        if results is None:
            run = segment_to(folder, _frames_to_segment(dataset, chosen), settings, quality)
        masks = StoredMasks(folder)
        if sequences is None:
            masks.check_sequences(one.name for one in listed)
        scores = _score(dataset, chosen, masks)
        document = report.make_document(
            dataset=dataset, split=split, scores=scores, run=run, attributes_of=attributes_of, row=row
        )
        typer.echo(report.render(document))
        if json_file is not None:
            json_file.write_text(json.dumps(document, indent=2) + "\n")
        _draw(scores, chosen, masks, worst=worst, contact_sheet=contact_sheet)


def _refuse(options: Mapping[str, object], *, beside: str) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise Misconfigured(f"{given[0]} means nothing beside {beside}.")


def _check_paths(
    results: Path | None, save_masks: Path | None, json_file: Path | None, *, pictures: Iterable[Path | None]
) -> None:
    """Refuse before the work what would be refused after it."""
    if results is not None and not results.is_dir():
        raise Misconfigured(f"There is no folder {results}.")
    if save_masks is not None and save_masks.exists():
        raise Misconfigured(f"{save_masks} exists already.")
    for picture in pictures:
        if picture is not None and picture.suffix.lower() not in _PICTURE_SUFFIXES:
            raise Misconfigured(f"{picture} must end in one of {', '.join(_PICTURE_SUFFIXES)}.")
    for path in (json_file, *pictures):
        if path is not None and not path.parent.is_dir():
            raise Misconfigured(f"There is no folder {path.parent}.")


def _list_sequences(dataset: report.Dataset, root: Path, split: Split) -> list["VideoSequence"]:
    from model.datasets import davis16, youtube_objects

    return davis16(root, split) if dataset == "davis16" else youtube_objects(root)


def _choose(listed: Sequence["VideoSequence"], names: str | None) -> Sequence["VideoSequence"]:
    if names is None:
        return listed
    by_name = {sequence.name: sequence for sequence in listed}
    wanted = dict.fromkeys(name.strip() for name in names.split(","))
    if unknown := [name for name in wanted if name not in by_name]:
        raise Misconfigured(f"No such sequence: {', '.join(unknown)}; there are {', '.join(by_name)}.")
    return [by_name[name] for name in wanted]


def _read_attributes(path: Path, sequences: Iterable["VideoSequence"]) -> dict[str, list[str]]:
    import yaml

    try:
        database = _DavisDatabase.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise Misconfigured(
            f"{path} must list `sequences` in YAML, each with `name` and `attributes`, as DAVIS's db_info."
        ) from error
    attributes_of = {entry.name: entry.attributes for entry in database.sequences}
    if missing := [one.name for one in sequences if one.name not in attributes_of]:
        raise Misconfigured(f"{path} does not know the sequence {', '.join(missing)}.")
    return attributes_of


def _choose_row(
    dataset: report.Dataset, named: str | None, config: "IMCNetConfig | None", quality: Quality
) -> str:
    from model.evaluation import paper

    rows = paper.DAVIS16_VAL if dataset == "davis16" else paper.YOUTUBE_OBJECTS
    row = named or _fitting_row(config, quality)
    if row is None:
        raise Misconfigured(f"No row of the paper is known to fit; give --paper-row: {', '.join(rows)}.")
    if row not in rows:
        raise Misconfigured(f"The paper has no row {row} for this dataset, but {', '.join(rows)}.")
    return row


def _fitting_row(config: "IMCNetConfig | None", quality: Quality) -> str | None:
    """The row of the network and its test; None if the paper has no such row, or the network is not known."""
    if config is None:
        return None
    from model.variants import row_of

    with contextlib.suppress(ValueError):
        return row_of(config, quality)
    return None


def _config(settings: WorkerSettings) -> "IMCNetConfig":
    from model.weights import read_info

    return read_info(require_weights(settings)).config


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="imcnet-masks-") as folder:
        yield Path(folder)


def _frames_to_segment(
    dataset: report.Dataset, sequences: Iterable["VideoSequence"]
) -> list[tuple["VideoSequence", Sequence[int]]]:
    """Every frame of DAVIS, as its results are exchanged; of YouTube-Objects the annotated ones."""
    from model.evaluation import youtube_objects

    if dataset == "davis16":
        return [(one, range(len(one.frames))) for one in sequences]
    return [(one, youtube_objects.scored_frames(one)) for one in sequences]


def _score(
    dataset: report.Dataset, sequences: Iterable["VideoSequence"], masks: "StoredMasks"
) -> tuple["SequenceScores", ...]:
    from tqdm import tqdm

    from model.evaluation import davis, youtube_objects

    score = davis.score_sequence if dataset == "davis16" else youtube_objects.score_sequence
    return tuple(score(masks, one) for one in tqdm(sequences, desc="Scoring", unit="video", disable=None))


def _draw(
    scores: Sequence["SequenceScores"],
    sequences: Iterable["VideoSequence"],
    masks: "StoredMasks",
    *,
    worst: Path | None,
    contact_sheet: Path | None,
) -> None:
    from model.evaluation import gallery

    by_name = {one.name: one for one in sequences}
    if worst is not None:
        gallery.write_worst(worst, scores, by_name, masks)
    if contact_sheet is not None:
        gallery.write_contact_sheet(contact_sheet, scores, by_name, masks)
