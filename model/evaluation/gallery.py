"""Pictures of how well masks fit: what figures do not show."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from model.datasets import VideoSequence, read_frame
from model.evaluation.boundary import boundary, dilate
from model.evaluation.masks import Mask, read_truth
from model.evaluation.predictions import Predictions
from model.evaluation.scores import SequenceScores

_MAX_BYTES = 1_000_000
_TILE_WIDTHS = (360, 300, 250, 210, 180, 150)  # the widest that keeps the file small enough is taken
_CAPTION_HEIGHT, _FONT_SIZE, _GAP = 34, 12, 4
_TRUTH, _PREDICTION = (60, 210, 90), (255, 0, 200)
_WORST_ROWS = 8
_SHEET_SEQUENCES = 24


@dataclass(frozen=True)
class _Tile:
    picture: Image.Image
    caption: str


def write_worst(
    path: Path,
    scores: Iterable[SequenceScores],
    sequences: Mapping[str, VideoSequence],
    predictions: Predictions,
) -> None:
    """Draw the worst frames by J, at most one a sequence and eight in all: frame, truth and prediction.

    The picture is a PNG or a JPEG by the suffix of ``path``, of tiles that shrink to keep it below 1 MB, but
    not further than captions can be read, which may be too little for a PNG.
    """
    worst = sorted((min(zip(one.j, one.frames, strict=True)), one.name) for one in scores)
    rows = []
    for (j, index), name in worst[:_WORST_ROWS]:
        sequence = sequences[name]
        frame, truth, mask = _load(sequence, index, predictions)
        rows.append(
            [
                _tile(frame, f"{name}\nframe {sequence.frames[index].stem}"),
                _tile(_overlaid(frame, truth, _TRUTH), "truth"),
                _tile(_overlaid(frame, mask, _PREDICTION), f"prediction\nJ {j:.3f}"),
            ]
        )
    _write_small(path, rows)


def write_contact_sheet(
    path: Path,
    scores: Iterable[SequenceScores],
    sequences: Mapping[str, VideoSequence],
    predictions: Predictions,
) -> None:
    """Draw the masks of each sequence's best, median and worst frame by J, from the best sequence down.

    Of many sequences, 24 are shown that are evenly spread over the order. Kind and size of the picture are
    those of ``write_worst``.
    """
    ranking = sorted(scores, key=lambda one: fmean(one.j), reverse=True)
    shown = np.linspace(0, len(ranking) - 1, min(_SHEET_SEQUENCES, len(ranking))).round().astype(int)
    groups_a_row = 1 if len(shown) < 6 else 2
    rows: list[list[_Tile]] = []
    for place, position in enumerate(shown):
        if place % groups_a_row == 0:
            rows.append([])
        one = ranking[position]
        rows[-1] += _best_median_worst(one, sequences[one.name], predictions)
    _write_small(path, rows)


def _best_median_worst(
    scores: SequenceScores, sequence: VideoSequence, predictions: Predictions
) -> Iterator[_Tile]:
    best_first = sorted(zip(scores.j, scores.frames, strict=True), reverse=True)
    chosen = {"best": best_first[0], "median": best_first[len(best_first) // 2], "worst": best_first[-1]}
    for rank, (j, index) in chosen.items():
        frame, _, mask = _load(sequence, index, predictions)
        caption = f"{sequence.name}\n{sequence.frames[index].stem}, {rank}, J {j:.3f}"
        yield _tile(_overlaid(frame, mask, _PREDICTION), caption)


def _load(
    sequence: VideoSequence, index: int, predictions: Predictions
) -> tuple[NDArray[np.uint8], Mask, Mask]:
    """Frame, truth and prediction, at the size of the truth."""
    truth = read_truth(sequence, index)
    (mask,) = predictions.masks(sequence, [index])
    height, width = truth.shape
    frame = Image.fromarray(read_frame(sequence.frames[index])).resize((width, height))
    return np.asarray(frame), truth, mask


def _overlaid(frame: NDArray[np.uint8], mask: Mask, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Tint the foreground and draw its outline."""
    drawn = frame.copy()
    drawn[mask] = (drawn[mask] * 0.55 + np.array(colour) * 0.45).astype(np.uint8)
    drawn[dilate(boundary(mask), 1)] = colour
    return drawn


def _tile(picture: NDArray[np.uint8], caption: str) -> _Tile:
    height, width, _ = picture.shape
    return _Tile(Image.fromarray(picture).resize(_fitted(width, height, _TILE_WIDTHS[0])), caption)


def _write_small(path: Path, rows: Sequence[Sequence[_Tile]]) -> None:
    for width in _TILE_WIDTHS:
        data = io.BytesIO()
        # No palette for PNG: too few colours tear holes into tinted masks that are not there.
        _sheet(rows, width).save(data, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=85)
        if data.tell() <= _MAX_BYTES:
            break
    path.write_bytes(data.getvalue())


def _sheet(rows: Sequence[Sequence[_Tile]], width: int) -> Image.Image:
    heights = [max(_fitted(*tile.picture.size, width)[1] for tile in row) for row in rows]
    columns = max(len(row) for row in rows)
    size = (columns * (width + _GAP) + _GAP, sum(heights) + len(rows) * _CAPTION_HEIGHT + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            left = _GAP + column * (width + _GAP)
            draw.multiline_text((left, top + 3), tile.caption, fill="black", font=font, spacing=1)
            fitted = tile.picture.resize(_fitted(*tile.picture.size, width))
            sheet.paste(fitted, (left, top + _CAPTION_HEIGHT))
        top += height + _CAPTION_HEIGHT
    return sheet


def _fitted(width: int, height: int, target: int) -> tuple[int, int]:
    return target, max(1, round(height * target / width))
