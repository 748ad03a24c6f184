"""Data that training never sees, so that a run can be judged on it: sequences and stills.

Both lists are part of what the shipped weights' figures mean. Adding a name makes earlier runs incomparable.
"""

from functools import cache
from importlib.resources import files

HELD_OUT_SEQUENCES = (
    # DAVIS-2016 train
    "bmx-bumps",
    "breakdance-flare",
    "car-turn",
    "mallard-fly",
    # further sequences
    "cdnet-traffic-d",
    "cdnet-traffic-e",
    "clip-gym-man",
    "clip-lady-running",
    "clip-tennis-man",
)
"""Sequences with masks on which `imcnet train` validates."""


@cache
def held_out_stills() -> frozenset[str]:
    """Names, without suffix, of the 120 stills from which the clips of the motion set are made."""
    return frozenset(files("model").joinpath("held_out_stills.txt").read_text(encoding="utf-8").split())
