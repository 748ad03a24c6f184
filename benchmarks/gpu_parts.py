"""The parts of a session on a borrowed GPU: tests, benchmark, profile and training.

On a CPU, every part runs at a tiny size, which only shows that it works.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import profile

from model.agreement import EXACT_GATE, FAST_GATE, Gate
from model.backbone import BackboneName
from model.benchmark import compare, untrained_network
from model.benchmark_report import engine_table, figures
from model.config import usual_config
from model.cuda import CudaEngine
from model.engine import Engine, TorchEngine
from model.engines import trying_out
from model.imcnet import IMCNet
from model.preprocess import resize_frame
from model.scenes import render_scene
from model.segmenter import Frame
from model.shipped import SHIPPED_WEIGHTS
from model.training.presets import RECIPES, Phase, Precision, Recipe
from model.training.recipe import SUMMARY_NAME, RecipeData, RecipeRun
from model.training.run_archive import archive_run, newest_weights, part_paths, write_parts
from model.training.shard import Shard
from model.training.sources import held_out_windows, packed_sources
from model.training.trainer import BEST_NAME, WEIGHTS_NAME
from model.weights import WeightsInfo, load_weights, save_weights

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = "shipped"
SHARD_NAME, START_NAME = "shard.zip", "start.safetensors"
TRACE_NAME = "trace.json.gz"
MAX_FILES = 8
MAX_FILE_BYTES = 2**24 - 2**16  # below 16 MiB
_SAVE_SECONDS = 120  # from one copy of the training's results to the next
_RESERVE_SECONDS = 20  # for the last copy


@dataclass(frozen=True)
class Scale:
    """Sizes and precision of a session's parts."""

    size: int
    frames: int
    rounds: int
    backbone: BackboneName
    precision: Precision
    dtype: torch.dtype
    capture: Literal["graphs", "eager"]
    workers: int

    def recipe(self) -> Recipe:
        """The shipped recipe in this precision; when tiny, with phases of one small step."""
        recipe = RECIPES[RECIPE]
        return replace(recipe, phases=tuple(self._phase(phase) for phase in recipe.phases))

    def _phase(self, phase: Phase) -> Phase:
        phase = replace(phase, precision=self.precision)
        if self == FULL:
            return phase
        return replace(
            phase,
            steps=1,
            sizes=(self.size,),
            validation_size=self.size,
            windows_per_step=min(1, phase.windows_per_step),
            stills_per_step=min(1, phase.stills_per_step),
        )


_WORKERS = max(1, (os.cpu_count() or 1) - 2)
FULL = Scale(480, 32, 3, "resnet101", "bfloat16", torch.float16, "graphs", _WORKERS)
TINY = Scale(32, 2, 1, "resnet18", "float32", torch.float32, "eager", 0)


@dataclass(frozen=True)
class Session:
    """Settings that all parts share.

    Args:
        folder: Data and start weights.
        out: Folder for the results.
        work: Folder of the training; a run with the same settings in it is resumed.
        first: Phase of the recipe to begin with.
        max_bytes: Largest size of all results together.
    """

    folder: Path
    out: Path
    work: Path
    device: torch.device
    first: str
    max_bytes: int

    @property
    def scale(self) -> Scale:
        return FULL if self.device.type == "cuda" else TINY


def run_tests(session: Session) -> None:
    """Run the tests of ``model/`` that need a GPU, if pytest is installed."""
    try:
        import pytest
    except ModuleNotFoundError:
        print("pytest is not installed: the tests are left out")
        return
    tests = sorted((REPOSITORY / "tests" / "model").rglob("test_*.py"))
    files = [str(path) for path in tests if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    # The project's settings ask for a plugin that may be missing; other versions have other warnings.
    options = ["-o", "addopts=--import-mode=importlib", "-W", "default", "-p", "no:cacheprovider", "-ra"]
    if session.device.type == "cuda":
        os.environ["REQUIRE_GPU"] = "1"
    if code := pytest.main(["-m", "gpu", *options, *files]):
        raise SystemExit(int(code))


def benchmark(session: Session) -> None:
    """Compare the published loop, PyTorch's engine and CUDA's, with the shipped and with random weights."""
    scale = session.scale
    frames = [image for image, _ in render_scene(frames=scale.frames, height=480, width=854)]
    shipped, info = load_weights(SHIPPED_WEIGHTS)
    for size in sorted({scale.size, info.input_size if scale == FULL else scale.size}):
        _compare(session, shipped, info.name, frames, size)
    random = untrained_network(usual_config(scale.backbone), frames, scale.size)
    _compare(session, random, f"random {scale.backbone}", frames, scale.size)


def _compare(session: Session, network: IMCNet, name: str, frames: list[Frame], size: int) -> None:
    device, scale = session.device, session.scale
    gate = FAST_GATE if scale == FULL else EXACT_GATE
    others: dict[Engine, Gate] = {_cuda_engine(network, session): gate}
    rounds = compare(network, frames, device=device, input_size=size, rounds=scale.rounds, others=others)
    for number, results in enumerate(rounds, start=1):
        print(f"\n{name} at {size}, {len(frames)} frames, round {number} of {scale.rounds}\n")
        print(*engine_table([figures(result) for result in results], decimals=2), sep="\n")


def _cuda_engine(network: IMCNet, session: Session) -> CudaEngine:
    scale = session.scale
    with trying_out():
        return CudaEngine(network, device=session.device, dtype=scale.dtype, capture=scale.capture)


def profile_windows(session: Session) -> None:
    """Profile a batch of windows of the shipped weights on both engines; write the CUDA engine's trace."""
    network, info = load_weights(SHIPPED_WEIGHTS)
    size = info.input_size if session.scale == FULL else session.scale.size
    for engine in (TorchEngine(network, device=session.device), _cuda_engine(network, session)):
        found = _profile(engine, size, network.config.num_frames)
        print(f"\n{engine.name}: {engine.batch} frames encoded, as many windows decoded, at {size}\n")
        key = f"self_{'device' if session.device.type == 'cuda' else 'cpu'}_time_total"
        print(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))
    trace = session.out / TRACE_NAME
    found.export_chrome_trace(str(trace))
    if trace.stat().st_size > MAX_FILE_BYTES:
        trace.unlink()
        print(f"the trace is left out: it takes more than {MAX_FILE_BYTES} bytes")


def _profile(engine: Engine, size: int, window: int) -> profile:
    scene = render_scene(frames=engine.batch, height=480, width=854)
    images = torch.stack([resize_frame(image, size) for image, _ in scene])

    def segment() -> None:
        features = engine.encode(images) * window
        engine.decode([features[place : place + window] for place in range(engine.batch)]).cpu()

    for _ in range(3):  # chooses kernels, and captures graphs
        segment()
    found = profile()
    with found:
        segment()
    return found


def train(session: Session, *, seconds: float) -> None:
    """Train the recipe from the packed weights; its results are copied to ``out`` every two minutes."""
    end = time.monotonic() + max(1.0, seconds - _RESERVE_SECONDS)
    training = _training(session)
    finished = False
    while not finished and (left := end - time.monotonic()) > 0:
        finished = training.run(seconds=min(left, _SAVE_SECONDS))
        print((session.work / SUMMARY_NAME).read_text(encoding="utf-8"), flush=True)
        copy_results(session, training.recipe)


def _training(session: Session) -> RecipeRun:
    recipe, shard = session.scale.recipe(), Shard(session.folder / SHARD_NAME)
    network = recipe.network
    return RecipeRun(
        RECIPE,
        recipe,
        RecipeData(
            packed_sources(shard, num_frames=network.num_frames, strides=recipe.strides),
            held_out_windows(shard, network.num_frames, network.frame_stride),
        ),
        info=WeightsInfo(
            name=f"imcnet-{network.backbone}",
            config=network,
            trained=True,
            provenance=f"trained on {session.device.type} with a part of the data",
            licence="CC-BY-NC-4.0",
        ),
        folder=session.work,
        device=session.device,
        start=session.folder / START_NAME,
        first=session.first,
        workers=session.scale.workers,
    )


def copy_results(session: Session, recipe: Recipe) -> None:
    """Write the best weights in half precision and the numbered parts that resume the run into ``out``.

    If the parts are too many files or bytes, they are left out, with a message.
    """
    run, out = session.work, session.out
    best = run / BEST_NAME
    network, info = load_weights(best if best.exists() else newest_weights(run))
    save_weights(out / WEIGHTS_NAME, network, info, dtype=torch.float16)
    content = archive_run(run, recipe)
    others = [path.stat().st_size for path in set(out.iterdir()) - set(part_paths(out))]
    parts = -(-len(content) // MAX_FILE_BYTES)
    if len(others) + parts > MAX_FILES or sum(others) + len(content) > session.max_bytes:
        print(f"what resumes the run is left out: {parts} files, {len(content)} bytes")
        content = b""
    write_parts(content, out, MAX_FILE_BYTES)
