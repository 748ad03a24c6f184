"""`imcnet evaluate`: J and F of the network, or of anyone's masks, on annotated sequences."""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import evaluation_report as report
from service.cli.evaluation_data import Dataset, Split, choose, open_source, read_attributes
from service.cli.evaluation_run import SegmentationPath, segment_to
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

_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")


def evaluate(
    dataset: Annotated[
        Dataset, typer.Option(help="Data set. motion: clips rendered from the data in --root.")
    ],
    root: Annotated[
        Path, typer.Option(help="Folder of the data set: unpacked, or the packed development data.")
    ],
    split: Annotated[
        Split, typer.Option(help="Split of DAVIS. held-out: the sequences that training leaves out.")
    ] = "val",
    weights: WeightsOption = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [IMCNET_DEVICE]")] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the square that frames are resized to [IMCNET_INPUT_SIZE]")
    ] = None,
    quality: Annotated[
        Quality, typer.Option(help="multi_scale looks at each frame nine times, as the paper's best row.")
    ] = "exact",
    path: Annotated[
        SegmentationPath,
        typer.Option(
            help="windows: segment a frame with its neighbours. still: each frame by itself, same weights."
        ),
    ] = "windows",
    results: Annotated[
        Path | None, typer.Option(help="Score the masks <sequence>/<frame>.png in this folder; no weights.")
    ] = None,
    save_masks: Annotated[
        Path | None, typer.Option(help="New folder for the network's masks, laid out as for --results.")
    ] = None,
    save_clips: Annotated[
        Path | None, typer.Option(help="New folder for the clips of the motion set, laid out as DAVIS.")
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
    """Measure how well masks fit the annotations of a data set: J, F, flicker and time per frame."""
    from model.evaluation.predictions import StoredMasks

    if results is not None:
        _refuse({"--weights": weights, "--device": device, "--input-size": input_size}, beside="--results")
        _refuse({"--save-masks": save_masks, "--path still": path == "still"}, beside="--results")
    if path == "still":
        _refuse({"--quality fast": quality == "fast"}, beside="--path still")
    if dataset != "davis16":
        _refuse(
            {"--attributes": attributes, f"--split {split}": split != "val"}, beside=f"--dataset {dataset}"
        )
    if dataset == "motion":
        _refuse({"--compare-paper": compare_paper, "--paper-row": paper_row}, beside="--dataset motion")
    else:
        _refuse({"--save-clips": save_clips}, beside=f"--dataset {dataset}")
    _check_paths(results, (save_masks, save_clips), json_file, pictures=(worst, contact_sheet))
    source = open_source(dataset, root, split)
    names = choose(source.names, sequences)
    attributes_of = None if attributes is None else read_attributes(attributes, names)
    settings = read_settings(WorkerSettings, weights=weights, device=device, input_size=input_size)
    if results is None:
        require_weights(settings)
    row = None
    if compare_paper or paper_row is not None:
        known = results is None and path == "windows"
        row = _choose_row(dataset, paper_row, _config(settings) if known else None, quality)

    with _folder(save_clips) as frames, _folder(results or save_masks) as folder:
        chosen = source.load(names, frames)
        run = None
        if results is None:
            run = segment_to(folder, _frames_to_segment(dataset, chosen), settings, quality, path)
        masks = StoredMasks(folder)
        if sequences is None:
            masks.check_sequences(source.names)
        scores = _score(dataset, chosen, masks)
        document = report.make_document(
            dataset=dataset, split=split, scores=scores, run=run, attributes_of=attributes_of, row=row
        )
        typer.echo(report.render(document))
        if json_file is not None:
            json_file.write_text(json.dumps(document, indent=2) + "\n")
        _draw(scores, chosen, masks, worst=worst, contact_sheet=contact_sheet)


def _refuse(options: Mapping[str, object], *, beside: str) -> None:
    if given := [name for name, value in options.items() if value is not None and value is not False]:
        raise Misconfigured(f"{given[0]} means nothing beside {beside}.")


def _check_paths(
    results: Path | None,
    new_folders: Iterable[Path | None],
    json_file: Path | None,
    *,
    pictures: Iterable[Path | None],
) -> None:
    """Refuse before the work what would be refused after it."""
    if results is not None and not results.is_dir():
        raise Misconfigured(f"There is no folder {results}.")
    for folder in new_folders:
        if folder is not None and folder.exists():
            raise Misconfigured(f"{folder} exists already.")
    for picture in pictures:
        if picture is not None and picture.suffix.lower() not in _PICTURE_SUFFIXES:
            raise Misconfigured(f"{picture} must end in one of {', '.join(_PICTURE_SUFFIXES)}.")
    for path in (json_file, *pictures):
        if path is not None and not path.parent.is_dir():
            raise Misconfigured(f"There is no folder {path.parent}.")


def _choose_row(dataset: Dataset, named: str | None, config: "IMCNetConfig | None", quality: Quality) -> str:
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
    with tempfile.TemporaryDirectory(prefix="imcnet-evaluate-") as folder:
        yield Path(folder)


def _frames_to_segment(
    dataset: Dataset, sequences: Iterable["VideoSequence"]
) -> list[tuple["VideoSequence", Sequence[int]]]:
    """Every frame, as the results of DAVIS are exchanged; of YouTube-Objects the annotated ones."""
    from model.evaluation import youtube_objects

    if dataset == "youtube-objects":
        return [(one, youtube_objects.scored_frames(one)) for one in sequences]
    return [(one, range(len(one.frames))) for one in sequences]


def _score(
    dataset: Dataset, sequences: Iterable["VideoSequence"], masks: "StoredMasks"
) -> tuple["SequenceScores", ...]:
    from tqdm import tqdm

    from model.evaluation import davis, youtube_objects

    score = youtube_objects.score_sequence if dataset == "youtube-objects" else davis.score_sequence
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
