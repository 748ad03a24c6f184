"""Progress of a recipe's run, as a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from model.training.trainer import LOG_NAME, read_history
from model.training.training_log import read_log

_HEAD = (
    f"{'phase':<10}{'steps':>7}{'core-hours':>12}{'loss':>8}{'J':>7}{'still J':>9}{'best J':>8}{'at step':>9}"
)


def summary(folder: Path, phases: Sequence[str]) -> str:
    """A line for each started phase of a run, then J by sequence at the best validation, in percent.

    ``J`` (windows) and ``still J`` (still path) are from the phase's last validation.
    """
    lines = [_HEAD]
    log = read_log(folder / LOG_NAME) if (folder / LOG_NAME).exists() else []
    validations = [{**entry, "phase": phase} for phase in phases for entry in read_history(folder / phase)]
    for phase in phases:
        logged = [line for line in log if line["phase"] == phase]
        validated = [entry for entry in validations if entry["phase"] == phase]
        if logged:
            lines.append(_phase_line(phase, logged, validated))
    if validations:
        best = max(validations, key=lambda entry: entry["j"])
        lines += ["", *_sequence_lines(best)]
    return "\n".join(lines) + "\n"


def _phase_line(phase: str, logged: list[dict[str, Any]], validated: list[dict[str, Any]]) -> str:
    hours = sum(line["core_seconds_per_step"] * line["steps"] for line in logged) / 3600
    line = f"{phase:<10}{logged[-1]['step']:>7}{hours:>12.2f}"
    if not validated:
        return line
    last, best = validated[-1], max(validated, key=lambda entry: float(entry["j"]))
    figures = f"{last['loss']:>8.3f}{100 * last['j']:>7.1f}{100 * last['still_j']:>9.1f}"
    return f"{line}{figures}{100 * best['j']:>8.1f}{best['step']:>9}"


def _sequence_lines(best: dict[str, Any]) -> Iterator[str]:
    yield f"Best held-out J: {best['phase']}, step {best['step']}"
    yield f"{'sequence':<20}{'windows':>9}{'still':>8}"
    for name, windows in best["windows"].items():
        yield f"{name:<20}{100 * windows:>9.1f}{100 * best['stills'][name]:>8.1f}"
    yield f"{'mean':<20}{100 * best['j']:>9.1f}{100 * best['still_j']:>8.1f}"
