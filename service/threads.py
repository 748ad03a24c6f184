"""How the threads of PyTorch's OpenMP runtime wait for each other. Never imports torch."""

import os
from collections.abc import MutableMapping


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make OpenMP's threads sleep while they wait, unless ``environment`` already sets how they wait.

    By default libgomp's threads wait in busy loops, some hundred times a frame. If another process takes a
    core from one of them, the others keep theirs busy until it is back. libgomp reads its environment when it
    is loaded, so this takes effect only before torch is imported, and in child processes.
    """
    if "GOMP_SPINCOUNT" not in environment:
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
