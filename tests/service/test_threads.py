"""OpenMP's threads sleep while they wait, in every process that the command line starts."""

import os
import subprocess
import sys

import pytest

from service.threads import wait_passively

# libgomp prints what it has read when it is loaded, which is when torch is imported.
PROGRAM = """
import sys
from service.cli import main
sys.argv = ["imcnet", "--version"]
try:
    main()
except SystemExit:
    assert "torch" not in sys.modules
    import torch
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "1000"}, {"GOMP_SPINCOUNT": "1000"}),
    ],
)
def test_threads_wait_passively_unless_told_otherwise(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    wait_passively(given)
    assert given == expected


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_the_command_tells_openmp_before_torch_loads_it(chosen: str | None) -> None:
    environment = {
        **{
            name: value
            for name, value in os.environ.items()
            if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        },
        **({"OMP_WAIT_POLICY": chosen} if chosen else {}),
        "OMP_DISPLAY_ENV": "true",
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"OMP_WAIT_POLICY = '{chosen or 'PASSIVE'}'" in result.stderr
