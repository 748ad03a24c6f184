"""Draws the validations of consecutive runs: loss, and held-out J of windows and of the still path."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_SIZE = (960, 640)
_LEFT, _RIGHT, _TOP, _GAP, _BOTTOM = 70, 20, 30, 30, 50  # pixels around and between the two panels
_FONT_SIZE = 15
_TICKS = 5
_GREY, _LOSS, _WINDOWS, _STILLS = "#cccccc", "#444444", "#c0392b", "#2471a3"


@dataclass(frozen=True)
class _Panel:
    """A coordinate system in the picture."""

    top: float
    bottom: float
    steps: float
    lowest: float
    highest: float

    def place(self, step: float, value: float) -> tuple[float, float]:
        share = (value - self.lowest) / (self.highest - self.lowest)
        width = _SIZE[0] - _LEFT - _RIGHT
        return _LEFT + width * step / self.steps, self.bottom - (self.bottom - self.top) * share


def draw_learning_curve(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Image.Image:
    """Two panels over the steps of all runs: training loss; J of windows and of the still path in percent.

    Args:
        histories: Validations by run, in order; each has ``step``, ``loss``, ``j`` and ``still_j``.
    """
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    runs = {name: history for name, history in histories.items() if history}
    starts, steps = {}, 0.0
    for name, history in runs.items():
        starts[name], steps = steps, steps + history[-1]["step"]
    middle = (_SIZE[1] - _TOP - _BOTTOM - _GAP) / 2 + _TOP
    losses = [entry["loss"] for history in runs.values() for entry in history]
    upper = _Panel(_TOP, middle, max(steps, 1), 0, 1.1 * max(losses, default=1))
    lower = _Panel(middle + _GAP, _SIZE[1] - _BOTTOM, max(steps, 1), 0, 100)
    for panel, title in ((upper, "training loss"), (lower, "held-out J, %")):
        _draw_axes(draw, panel, title, starts)
    for name, history in runs.items():
        for panel, key, factor, colour in (
            (upper, "loss", 1, _LOSS),
            (lower, "still_j", 100, _STILLS),
            (lower, "j", 100, _WINDOWS),
        ):
            _draw_line(
                draw,
                [panel.place(starts[name] + entry["step"], factor * entry[key]) for entry in history],
                colour,
            )
    font = ImageFont.load_default(_FONT_SIZE)
    draw.text((_LEFT, _SIZE[1] - 22), f"{steps:,.0f} steps", "black", font)
    draw.text((_SIZE[0] - 330, _SIZE[1] - 22), "windows", _WINDOWS, font)
    draw.text((_SIZE[0] - 240, _SIZE[1] - 22), "still path of the same weights", _STILLS, font)
    return image


def _draw_axes(draw: ImageDraw.ImageDraw, panel: _Panel, title: str, starts: Mapping[str, float]) -> None:
    font = ImageFont.load_default(_FONT_SIZE)
    for value in _ticks(panel):
        left, right = panel.place(0, value), panel.place(panel.steps, value)
        draw.line([left, right], _GREY)
        draw.text((_LEFT - 8, left[1]), f"{value:.4g}", "black", font, anchor="rm")
    for name, start in starts.items():
        draw.line([panel.place(start, panel.lowest), panel.place(start, panel.highest)], _GREY)
        draw.text((panel.place(start, 0)[0] + 4, panel.top + 2), name, "black", font)
    draw.text((_LEFT, panel.top - 4), title, "black", font, anchor="ls")


def _ticks(panel: _Panel) -> Iterator[float]:
    for tick in range(_TICKS):
        yield panel.lowest + (panel.highest - panel.lowest) * tick / (_TICKS - 1)


def _draw_line(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str) -> None:
    draw.line(list(points), colour, width=2)
    for x, y in points:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
