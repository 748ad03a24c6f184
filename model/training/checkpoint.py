"""Checkpoints: everything that a run needs to go on as if it had never stopped."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from model.errors import CheckpointError

SETTINGS_NAME = "settings.json"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all: a run may be killed at any time.

    Args:
        state: Tensors, numbers, strings, and lists and dicts of them.
    """
    with replacing(path) as unfinished:
        torch.save(state, unfinished)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing that it holds is executed.

    Raises:
        CheckpointError: The file is missing, or is no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(state).__name__}")
    return state


def require_same(path: Path, found: object, expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was made with other settings.

    Raises:
        CheckpointError: ``found`` is not ``expected``; the message names what differs.
    """
    if found == expected:
        return
    had = found if isinstance(found, Mapping) else {}
    names = sorted(name for name in {*had, *expected} if had.get(name) != expected.get(name))
    differences = (f"{name} {had.get(name)!r}, not {expected.get(name)!r}" for name in names)
    raise CheckpointError(
        f"{path} belongs to another run, with {'; '.join(differences)}: give its settings, or another folder"
    )


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder that of a run with these settings, which can be written as JSON.

    Raises:
        CheckpointError: It is that of a run with others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_NAME
    if path.exists():
        require_same(path, json.loads(path.read_text()), json.loads(json.dumps(settings)))
        return
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(settings, indent=1))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside ``path`` to write to, which takes its place if nothing is raised."""
    # One name, not one for each process: what a killed run leaves, the next one overwrites.
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
