"""Row 21: many short jobs while everything is killed at random."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.conftest import Row, Scale
from tests.chaos.rig import Rig
from tests.chaos.soak import SETTINGS, clips, soak

pytestmark = [pytest.mark.chaos, pytest.mark.processes]


@pytest.mark.row(21, "short jobs with random kills")
def test_many_jobs_survive_many_kills(
    make_rig: Callable[..., Rig], tmp_path: Path, scale: Scale, chance: random.Random, row: Row
) -> None:
    rig = make_rig(**SETTINGS)
    rig.start_api()
    rig.start_workers(2)
    progress: list[str] = []
    report = soak(rig, clips(tmp_path), jobs=scale.of(quick=30, full=150), chance=chance, say=progress.append)
    row.runs += sum(report.ends.values())
    row.figures["kills"] = str(sum(report.faults.values()))
    row.figures["jobs with more than one attempt"] = str(
        sum(count for attempts, count in report.attempts.items() if attempts > 1)
    )
