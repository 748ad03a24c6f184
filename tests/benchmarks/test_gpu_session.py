import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gpu_parts import MAX_FILE_BYTES, MAX_FILES, TINY
from benchmarks.gpu_session import join, main, pack
from model.errors import CheckpointError
from model.training.run_archive import PART_NAME, join_parts, write_parts
from model.training.trainer import BEST_NAME, WEIGHTS_NAME, is_finished
from model.weights import init_weights, load_weights
from tests.conftest import REPOSITORY
from tests.training_data import write_packed

# Absent from a machine that has only what model/ imports.
ABSENT = ("av", "fastapi", "openvino", "pydantic", "pydantic_settings", "redis", "rq", "structlog", "typer")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed session: tiny data and random weights of the recipe's network."""
    folder = tmp_path_factory.mktemp("packed")
    write_packed(folder / "data", frames=5)
    weights = folder / "newest.safetensors"
    init_weights(weights, TINY.recipe().network, seed=0)
    pack(folder / "session", folder / "data", folder / "cache", weights, max_mib=8)
    return folder / "session"


@pytest.fixture(scope="module")
def results(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a session on the CPU, where only what ``model/`` needs can be imported."""
    folder = tmp_path_factory.mktemp("results")
    absent, out = folder / "absent", folder / "out"
    absent.mkdir()
    for name in ABSENT:
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')\n")
    options = ["--out", out, "--work", folder / "run", "--device", "cpu", "--minutes", "60"]
    with pytest.MonkeyPatch.context() as machine:
        machine.chdir(REPOSITORY)
        machine.setenv("PYTHONPATH", f"{absent}{os.pathsep}{REPOSITORY}")
        machine.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a bare machine has no plugins
        machine.setenv("OMP_NUM_THREADS", "1")
        main(["run", str(packed), *map(str, options)])  # every part is a process
    return out


def test_a_session_does_all_its_parts_with_what_model_imports(results: Path) -> None:
    machine, tests, benchmark, profile, train = (results / "report.txt").read_text().split("\n==== ")
    assert machine.startswith("no CUDA device: a trial on the CPU at tiny sizes")
    assert "there is no CUDA device" in tests  # the reason for skipping
    for name in ("imcnet-efficientnet_lite0", "random resnet18"):
        assert f"{name} at {TINY.size}" in benchmark
    for engine in ("published loop", "torch-float32", "cpu-eager-float32"):
        assert benchmark.count(f"| {engine} |") == 2
    assert "aten::" in profile
    assert "joint" in train


def test_results_are_few_and_small(results: Path) -> None:
    files = list(results.iterdir())
    assert {path.name for path in files} >= {"report.txt", "trace.json.gz", WEIGHTS_NAME, f"{PART_NAME}.1"}
    assert len(files) <= MAX_FILES == 8
    assert max(path.stat().st_size for path in files) <= MAX_FILE_BYTES < 16 * 2**20
    assert load_file(results / WEIGHTS_NAME)["propagation.top.0.weight"].dtype == torch.float16


def test_joined_results_are_the_run(results: Path, tmp_path: Path) -> None:
    join(results, tmp_path / "run")
    phase = TINY.recipe().phases[-1]
    assert is_finished(tmp_path / "run" / phase.name, phase.steps)
    assert load_weights(tmp_path / "run" / BEST_NAME)[1].config == TINY.recipe().network


def test_parts_that_are_missing_are_noticed(results: Path, tmp_path: Path) -> None:
    content = (results / f"{PART_NAME}.1").read_bytes()
    write_parts(content, tmp_path, len(content) // 3)
    (tmp_path / f"{PART_NAME}.2").unlink()
    with pytest.raises(CheckpointError, match="parts are damaged"):
        join_parts(tmp_path, tmp_path / "run")


def test_the_data_take_at_most_what_is_allowed(packed: Path) -> None:
    assert 0 < (packed / "shard.zip").stat().st_size <= 8 * 2**20


def test_without_cuda_a_session_is_refused_unless_it_is_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal = "nothing was run: device 'cuda' is not there: found 0 CUDA device(s); --device cpu"
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "session"), "--out", str(tmp_path / "out")])
    assert str(stopped.value).startswith(refusal)
    assert (tmp_path / "out" / "report.txt").read_text().startswith(refusal)
