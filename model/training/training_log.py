"""The log of a training: a line of JSON every few steps, with early signs of divergence."""

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.training.checkpoint import replacing
from model.training.forward_pass import Measurements


class TrainingLog:
    """Collects the figures of steps and appends them to a file.

    The fields of a line are:

    - ``phase``, ``step`` (the last one) and ``steps`` (how many the line covers)
    - means over these steps: ``loss`` by part, ``gradient_norm``, ``seconds_per_step`` and
      ``core_seconds_per_step``
    - of the last step: ``rates`` (highest and lowest), ``offsets`` (mean |offset| by alignment stage, in
      pixels) and ``affinity`` (largest weight, see ``Measurements``; None for a network without affinity)

    Args:
        path: File of the run, shared by its phases.
        step: Step from which the phase resumes; lines of later steps are dropped.
    """

    def __init__(self, path: Path, phase: str, *, step: int) -> None:
        self._path, self._phase = path, phase
        self._drop_after(step)
        self._restart()

    def add(self, losses: Mapping[str, float], gradient_norm: float) -> None:
        """Note the losses of a step by part."""
        for part, loss in losses.items():
            self._losses[part].append(loss)
        self._norms.append(gradient_norm)

    def write(self, step: int, rates: list[float], measured: Measurements) -> dict[str, Any]:
        """Append a line for the steps since the last line, and return it."""
        steps = len(self._norms)
        line = {
            "phase": self._phase,
            "step": step,
            "steps": steps,
            "loss": {part: _rounded(np.mean(losses)) for part, losses in self._losses.items()},
            "gradient_norm": _rounded(np.mean(self._norms)),
            "offsets": [_rounded(offset) for offset in measured.offsets],
            "affinity": _rounded(measured.affinity),
            "rates": [max(rates), min(rates)],
            "seconds_per_step": _rounded((time.monotonic() - self._began) / steps),
            "core_seconds_per_step": _rounded((time.process_time() - self._cpu_began) / steps),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._restart()
        return line

    def _restart(self) -> None:
        self._losses: defaultdict[str, list[float]] = defaultdict(list)
        self._norms: list[float] = []
        self._began, self._cpu_began = time.monotonic(), time.process_time()

    def _drop_after(self, step: int) -> None:
        """Drop lines that a killed run wrote after its last checkpoint, and an incomplete last line."""
        if not self._path.exists():
            return
        kept = [line for line in read_log(self._path) if line["phase"] != self._phase or line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if text != self._path.read_text(encoding="utf-8"):
            with replacing(self._path) as unfinished:
                unfinished.write_text(text, encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a log."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _rounded(value: float | np.floating[Any] | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{float(value):.4g}")
