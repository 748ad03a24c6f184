"""Three packages, and no arrow between them but service ← worker → model; torch stays in the engine."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TORCH_FREE_SERVICE = {
    "service.broker",
    "service.durable",
    "service.errors",
    "service.jobs",
    "service.logs",
    "service.media",
    "service.processes",
    "service.queue",
    "service.reconciliation",
    "service.settings",
    "service.storage",
    "service.tally",
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{alias.name}"
                if node.module in ("service", "worker", "model")
                else node.module
                for alias in node.names
            )


def files(package: str) -> list[Path]:
    found = sorted((REPOSITORY / package).rglob("*.py"))
    assert found
    return found


def test_the_model_imports_nothing_of_service_or_worker() -> None:
    for path in files("model"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("service", "worker")], path


def test_the_model_needs_nothing_but_what_runs_the_network() -> None:
    needed = {"model", "torch", "torchvision", "numpy", "PIL", "safetensors", "tqdm"}
    for path in files("model"):
        found = {name.split(".")[0] for name in imports(path)}
        # Only the engines that need them import these files, when they are made; packed videos need PyAV.
        own = {"triton_deform.py": {"triton"}, "openvino_engine.py": {"openvino"}, "packed.py": {"av"}}
        assert found <= needed | own.get(path.name, set()) | sys.stdlib_module_names, path


def test_the_service_reaches_model_and_worker_from_the_command_line_only() -> None:
    for path in files("service"):
        if (REPOSITORY / "service" / "cli") not in path.parents:
            assert not [name for name in imports(path) if name.split(".")[0] in ("model", "worker")], path


def test_the_worker_imports_only_the_torch_free_half_of_the_service() -> None:
    for path in files("worker"):
        ours = {name for name in imports(path) if name.startswith("service.")}
        assert ours <= TORCH_FREE_SERVICE, path


def test_only_the_engine_imports_the_model() -> None:
    for path in files("worker"):
        if path.name != "engine.py":
            assert not [name for name in imports(path) if name.split(".")[0] in ("model", "torch")], path


@pytest.mark.parametrize(
    "module",
    [
        *("service.app", "service.cli", "service.probe", "worker.gpu_worker", "worker.tasks"),
        *("model.windows", "model.datasets", "model.evaluation.davis", "model.training.sampling"),
    ],
)
def test_torch_stays_out_of(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
