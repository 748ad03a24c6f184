import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gpu_parts import MAX_FILE_BYTES, MAX_FILES, TINY
from model.training.run_archive import PART_NAME
from model.training.trainer import BEST_NAME, WEIGHTS_NAME, is_finished
from model.weights import init_weights, load_weights
from tests.conftest import REPOSITORY
from tests.training_data import write_packed

# Absent from a machine that has only what model/ imports.
ABSENT = ("av", "fastapi", "openvino", "pydantic", "pydantic_settings", "redis", "rq", "structlog", "typer")


def gpu_session(*options: str | Path, absent: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = [*([str(absent)] if absent else []), str(REPOSITORY)]
    # Without plugins, pytest is that of a bare machine.
    bare = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session", *map(str, options)],
        cwd=REPOSITORY,
        env={**os.environ, **bare},
        text=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed session: tiny data and random weights of the recipe's network."""
    folder = tmp_path_factory.mktemp("packed")
    write_packed(folder / "data", frames=5)
    weights = folder / "newest.safetensors"
    init_weights(weights, TINY.recipe().network, seed=0)
    data = ("--data", folder / "data", "--cache", folder / "cache", "--weights", weights, "--mib", "8")
    done = gpu_session("pack", folder / "session", *data)
    assert done.returncode == 0, done.stderr
    return folder / "session"


@pytest.fixture(scope="module")
def absent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules that cannot be imported."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')\n")
    return folder


@pytest.fixture(scope="module")
def results(packed: Path, absent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    out = folder / "out"
    done = gpu_session(
        "run", packed, "--out", out, "--work", folder / "run", "--device", "cpu", absent=absent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == (out / "report.txt").read_text()
    return out


def test_a_session_does_all_its_parts_with_what_model_imports(results: Path) -> None:
    report = (results / "report.txt").read_text()
    tests, benchmark, profile, train = report.split("\n==== ")[1:]
    assert "skipped" in tests
    assert "there is no CUDA device" in tests
    assert "random resnet18 at 64" in benchmark
    for engine in ("published loop", "torch-float32", "cuda-float32"):
        assert benchmark.count(f"| {engine} |") == 2
    assert "aten::" in profile
    assert "joint" in train


def test_results_are_few_and_small(results: Path) -> None:
    files = list(results.iterdir())
    assert {path.name for path in files} >= {"report.txt", "trace.json.gz", WEIGHTS_NAME, f"{PART_NAME}.1"}
    assert len(files) <= MAX_FILES
    assert max(path.stat().st_size for path in files) <= MAX_FILE_BYTES < 16 * 2**20
    assert load_file(results / WEIGHTS_NAME)["propagation.top.0.weight"].dtype == torch.float16


def test_joined_results_are_the_run(results: Path, tmp_path: Path) -> None:
    done = gpu_session("join", results, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    phase = TINY.recipe().phases[-1]
    assert is_finished(tmp_path / "run" / phase.name, phase.steps)
    load_weights(tmp_path / "run" / BEST_NAME)


def test_without_cuda_a_session_is_refused_unless_it_is_a_trial(packed: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = gpu_session("run", packed, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "device 'cuda' is not there: found 0 CUDA device(s); --device cpu" in done.stderr
    assert not (tmp_path / "out").exists()
