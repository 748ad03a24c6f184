"""What `imcnet evaluate` tells: the figures as a document for JSON, and that document as tables."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

from model.evaluation import davis, paper, youtube_objects
from model.evaluation.scores import Figures, SequenceScores, by_attribute, by_category, j_by_category
from model.held_out import HELD_OUT_SEQUENCES
from service.cli.evaluation_data import Dataset, Split
from service.cli.evaluation_run import Run

Document = dict[str, Any]

_TITLES = {"davis16": "DAVIS-2016", "motion": "Motion set", "youtube-objects": "YouTube-Objects"}
_FIGURES = {
    "j_mean": "J mean",
    "j_recall": "recall",
    "j_decay": "decay",
    "f_mean": "F mean",
    "f_recall": "recall",
    "f_decay": "decay",
    "jf_mean": "J&F",
    "flicker": "flicker",
    "truth_flicker": "of truth",
}
_WHOLE = {**davis.SEQUENCES, "held-out": len(HELD_OUT_SEQUENCES)}
_CLIPS = 15  # of the motion set


def make_document(
    *,
    dataset: Dataset,
    split: Split,
    scores: Sequence[SequenceScores],
    run: Run | None,
    attributes_of: Mapping[str, Sequence[str]] | None,
    row: str | None,
) -> Document:
    """Gather all figures, as fractions of 1.

    Args:
        split: Split of DAVIS.
        run: None if the masks were given.
        attributes_of: The attributes of each sequence of DAVIS, by its name.
        row: Row of the paper to compare with.
    """
    document: Document = {"dataset": dataset, **({} if run is None else _about_the_run(run))}
    if dataset == "davis16":
        document |= {"split": split, **_davis_figures(scores, attributes_of)}
    elif dataset == "motion":
        document |= {**_davis_figures(scores, None), "kinds": _by_group(by_category(scores))}
    else:
        document |= _youtube_objects_figures(scores)
    if dataset != "youtube-objects":  # where a mask pays for a context that it shares with none
        document["seconds_per_frame"] = None if run is None else run.seconds_per_mask
    if row is not None:
        document["paper"] = {"row": row, **_paper_figures(dataset, row)}
    document["notes"] = [*_notes_on_the_scores(document), *_notes_on_the_comparison(document)]
    return document


def render(document: Document) -> str:
    """Lay a document out as tables, in percent."""
    title = f"{_TITLES[document['dataset']]} {document.get('split', '')}".rstrip()
    mean = {key: document[key] for key in _FIGURES if key in document}
    paragraphs = [
        f"{title}, in percent" + (f"\n{_describe_run(document)}" if "weights" in document else ""),
        _figures_table({**document["sequences"], "mean": mean}, count="frames"),
    ]
    if "attributes" in document:
        attributes = document["attributes"].items()
        rows = {f"{name} {davis.ATTRIBUTES.get(name, '')}": figures for name, figures in attributes}
        paragraphs.append(_figures_table(rows, count="sequences"))
    if "kinds" in document:
        paragraphs.append(_figures_table({**document["kinds"], "mean": mean}, count="sequences"))
    if "classes" in document:
        paragraphs.append(_figures_table({**document["classes"], "mean": mean}, count="sequences"))
    if "paper" in document:
        paragraphs.append(_comparison(document))
    if document["notes"]:
        paragraphs.append("\n".join(f"Note: {note}" for note in document["notes"]))
    return "\n\n".join(paragraphs)


# ---- the document -------------------------------------------------------------------------------------


def _about_the_run(run: Run) -> Document:
    info = {"name": run.info.name, "sha256": run.sha256, "trained": run.info.trained}
    return {
        "weights": {**info, "config": asdict(run.info.config)},
        "device": run.device,
        "hardware": run.hardware,
        "input_size": run.input_size,
        "quality": run.quality,
        "path": run.path,
    }


def _davis_figures(
    scores: Sequence[SequenceScores], attributes_of: Mapping[str, Sequence[str]] | None
) -> Document:
    groups = {} if attributes_of is None else by_attribute(scores, attributes_of)
    return {
        **_figures(scores),
        "sequences": {one.name: {"frames": len(one.frames), **_figures([one])} for one in scores},
        **({"attributes": _by_group(groups)} if groups else {}),
    }


def _by_group(groups: Mapping[str, Sequence[SequenceScores]]) -> Document:
    return {name: {"sequences": len(group), **_figures(group)} for name, group in groups.items()}


def _youtube_objects_figures(scores: Sequence[SequenceScores]) -> Document:
    means = j_by_category(scores)
    counts = Counter(one.category for one in scores)
    return {
        "j_mean": fmean(means.values()),
        "sequences": {one.name: {"frames": len(one.frames), "j_mean": fmean(one.j)} for one in scores},
        "classes": {name: {"sequences": counts[name], "j_mean": mean} for name, mean in means.items()},
    }


def _figures(scores: Sequence[SequenceScores]) -> dict[str, float]:
    figures = Figures.of(scores)
    return {
        "j_mean": figures.j.mean,
        "j_recall": figures.j.recall,
        "j_decay": figures.j.decay,
        "f_mean": figures.f.mean,
        "f_recall": figures.f.recall,
        "f_decay": figures.f.decay,
        "jf_mean": figures.jf_mean,
        "flicker": figures.flicker,
        "truth_flicker": figures.truth_flicker,
    }


def _paper_figures(dataset: Dataset, row: str) -> dict[str, float]:
    if dataset == "youtube-objects":
        return {"j_mean": round(paper.YOUTUBE_OBJECTS[row] / 100, 3)}
    figures = paper.DAVIS16_VAL[row]
    return {"j_mean": round(figures.j_mean / 100, 3), "f_mean": round(figures.f_mean / 100, 3)}


def _notes_on_the_scores(document: Document) -> Iterator[str]:
    if "weights" in document and not document["weights"]["trained"]:
        yield "the weights are random, not trained: these figures mean nothing."
    if document["dataset"] == "youtube-objects":
        part, whole, what = len(document["classes"]), youtube_objects.CLASSES, "classes"
    elif document["dataset"] == "motion":
        part, whole, what = len(document["sequences"]), _CLIPS, "clips"
    else:
        part, whole, what = len(document["sequences"]), _WHOLE[document["split"]], "sequences"
    if part < whole:
        yield f"{part} of the {whole} {what} were scored; published figures are those of all."


def _notes_on_the_comparison(document: Document) -> Iterator[str]:
    if "paper" not in document:
        return
    if document.get("split", "val") != "val":
        yield f"the paper's figures are those of val, ours those of {document['split']}."
    if "weights" not in document:
        yield "what network made these masks is not known here; the row of the paper was chosen by you."
        return
    backbone, size = document["weights"]["config"]["backbone"], paper.INPUT_SIZES[document["dataset"]]
    if backbone != paper.BACKBONE:
        yield f"the paper's backbone is {paper.BACKBONE}, ours {backbone}."
    if document["input_size"] != size:
        yield f"the paper's input size is {size}, ours {document['input_size']}."


# ---- its tables ---------------------------------------------------------------------------------------


def _describe_run(document: Document) -> str:
    weights, seconds = document["weights"], document.get("seconds_per_frame")
    return (
        f"{weights['name']}, SHA-256 {weights['sha256']}\n"
        f"{document['quality']}, {document['path']}, input size {document['input_size']}, "
        f"on {document['device']} ({document['hardware']})"
        + ("" if seconds is None else f": {seconds:.3f} s a frame, without reading it")
    )


def _figures_table(rows: Mapping[str, Document], *, count: Literal["frames", "sequences"]) -> str:
    keys = [key for key in _FIGURES if all(key in figures for figures in rows.values())]
    cells = [["", count, *(_FIGURES[key] for key in keys)]]
    for name, figures in rows.items():
        cells.append([name, str(figures.get(count, "")), *(_percent(figures[key]) for key in keys)])
    return _aligned(cells)


def _comparison(document: Document) -> str:
    theirs = document["paper"]
    rows = [["", "ours", "paper", "difference"]]
    for key in ("j_mean", "f_mean"):
        if key in theirs:
            difference = f"{100 * (document[key] - theirs[key]):+.1f}"
            rows.append([_FIGURES[key], _percent(document[key]), _percent(theirs[key]), difference])
    what = paper.DAVIS16_VAL[theirs["row"]].what
    return f"Beside the paper's row {theirs['row']}, {what}:\n{_aligned(rows)}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
