"""Sabotage from within: each folder is for a worker's PYTHONPATH and holds a ``sitecustomize``."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Victim = Literal["horse", "worker"]

_HERE = Path(__file__).parent


def shifted_clock(seconds: float) -> Mapping[str, str]:
    """Environment of a process whose wall clock is so far ahead (or behind); its monotonic clock is right."""
    return {"PYTHONPATH": _first("shifted_clock"), "CHAOS_CLOCK_SECONDS": str(seconds)}


def slow_storage(*, seconds: float) -> Mapping[str, str]:
    """Environment of a process for which every ``fsync`` takes so long."""
    return {"PYTHONPATH": str(_HERE / "slow_storage"), "CHAOS_FSYNC_SECONDS": str(seconds)}


def exit_at_delivery(moment: Literal["before", "after"]) -> Mapping[str, str]:
    """Environment of an API that kills itself before or after it queues a job, and so before its answer."""
    return {"PYTHONPATH": str(_HERE / "exit_at_delivery"), "CHAOS_MOMENT": moment}


@dataclass(frozen=True)
class ExitAtStep:
    """Kills a horse before a step: a call that changes what is in the storage, or its last call.

    The same worker serves for any number of steps: each order is for the next horse alone.
    """

    directory: Path
    data_dir: Path

    @property
    def environment(self) -> Mapping[str, str]:
        self.directory.mkdir(parents=True, exist_ok=True)
        return {
            "PYTHONPATH": _first("exit_at_step"),
            "CHAOS_STEPS": str(self.directory),
            "CHAOS_STORAGE": str(self.data_dir),
        }

    def order(self, step: int, *, victim: Victim = "horse") -> None:
        """Let the next horse die, alone or with its worker, before its step number ``step``, from 1."""
        draft = self.directory / "draft"
        draft.write_text(f"{step} {victim}")
        draft.rename(self.directory / "die-before")
        self._trace.unlink(missing_ok=True)

    def taken(self) -> list[str]:
        """The steps that the horse of the last order has begun, like ``fsync attempt-0001/masks.zip``."""
        return self._trace.read_text().splitlines() if self._trace.exists() else []

    @property
    def _trace(self) -> Path:
        return self.directory / "trace"


def _first(name: str) -> str:
    return os.pathsep.join([str(_HERE / name), *filter(None, [os.environ.get("PYTHONPATH")])])
