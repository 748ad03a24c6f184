"""A few minutes of a borrowed GPU: tests, benchmark, profile and training, with results in a few files.

    python -m benchmarks.gpu_session pack session --data DATA --cache CACHE --weights newest.safetensors
    python -m benchmarks.gpu_session run session --out results --minutes 8
    python -m benchmarks.gpu_session join results runs/gpu

``run`` is for the machine with the GPU. It needs what ``model/`` imports and nothing to download; pytest is
used if it is installed. The other two are for the machine with the data. More in docs/training.md.

Run all three in the root of the repository.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.gpu_parts import (
    RECIPE,
    SHARD_NAME,
    START_NAME,
    Session,
    benchmark,
    profile_windows,
    run_tests,
    train,
)
from model.errors import DeviceError, ModelError
from model.segmenter import resolve_device
from model.training.packed import PackedData
from model.training.presets import RECIPES
from model.training.run_archive import join_parts
from model.training.shard import write_shard
from model.training.trainer import BEST_NAME, WEIGHTS_NAME
from model.weights import load_weights, save_weights

PHASES = [phase.name for phase in RECIPES[RECIPE].phases]
REPORT_NAME = "report.txt"
SHARES = {"tests": 0.2, "benchmark": 0.25, "profile": 0.1, "train": 1.0}
"""Parts of a session in their order, and the most that each may take of the time; training takes the rest."""


def main(arguments: Sequence[str]) -> None:
    given = _parser().parse_args(arguments)
    try:
        match given.command:
            case "pack":
                pack(given.folder, given.data, given.cache, given.weights, max_mib=given.mib)
            case "run":
                start(given, arguments)
            case "join":
                join(given.results, given.run)
    except (ModelError, ValueError) as error:
        raise SystemExit(str(error)) from error


def pack(folder: Path, data: Path, cache: Path, weights: Path, *, max_mib: int) -> None:
    """Write a shard of the data of at most ``max_mib``, and the weights in half precision, into a folder."""
    recipe = RECIPES[RECIPE]
    network, info = load_weights(weights)
    if info.config != recipe.network:
        raise SystemExit(f"{weights} holds {info.config}, but the recipe trains {recipe.network}")
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / START_NAME, network, info, dtype=torch.float16)
    pictures = PackedData(data, cache, side=recipe.largest_size)
    write_shard(pictures, folder / SHARD_NAME, max_mib * 2**20, side=recipe.largest_size)
    for name in (START_NAME, SHARD_NAME):
        print(f"{folder / name}: {(folder / name).stat().st_size / 2**20:.1f} MiB")


def start(given: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Run a session, or one part of it in this process."""
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        device = resolve_device(given.device)
    except DeviceError as error:
        refusal = f"nothing was run: {error}; --device cpu tries everything out at tiny sizes"
        with (given.out / REPORT_NAME).open("a", encoding="utf-8") as report:
            report.write(f"{refusal}\n")
        raise SystemExit(refusal) from error
    session = Session(given.folder, given.out, given.work, device, given.first, given.mib * 2**20)
    match given.only:
        case "tests":
            run_tests(session)
        case "benchmark":
            benchmark(session)
        case "profile":
            profile_windows(session)
        case "train":
            train(session, seconds=60 * given.minutes)
        case None:
            if failed := run(session, arguments, minutes=given.minutes):
                raise SystemExit(f"failed or stopped: {', '.join(failed)}")


def run(session: Session, arguments: Sequence[str], *, minutes: float) -> list[str]:
    """Run all parts, each in a separate process: a part that crashes or hangs does not affect the others.

    Args:
        arguments: Command line of the session, which each part gets too.

    Returns:
        Parts that failed or were stopped.
    """
    end = time.monotonic() + 60 * minutes
    failed = []
    with (session.out / REPORT_NAME).open("a", encoding="utf-8", buffering=1) as report:
        _tell(report, f"{_machine(session.device)}; {minutes:g} minutes\n")
        for part, share in SHARES.items():
            seconds = min(60 * minutes * share, end - time.monotonic())
            _tell(report, f"\n==== {part}, at most {seconds:.0f} s\n")
            limits = ["--only", part, "--minutes", str(seconds / 60)]
            command = [sys.executable, "-u", "-m", "benchmarks.gpu_session", *arguments, *limits]
            if seconds <= 0 or not _succeeds(command, report, seconds):
                failed.append(part)
                _tell(report, f"{part} failed, or was stopped\n")
    return failed


def _succeeds(command: list[str], report: TextIO, seconds: float) -> bool:
    """Run a command, with its output in the report line by line; kill it and its children at the limit."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            for line in process.stdout:
                _tell(report, line)
        finally:
            limit.cancel()
    return process.returncode == 0


def _tell(report: TextIO, text: str) -> None:
    report.write(text)
    print(text, end="", flush=True)


def _machine(device: torch.device) -> str:
    name = "no CUDA device: a trial on the CPU at tiny sizes, whose figures say nothing about a GPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}; PyTorch {torch.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores"


def join(results: Path, run_folder: Path) -> None:
    """Make a run folder of a session's results, once their parts are found undamaged."""
    join_parts(results, run_folder)
    shutil.copyfile(results / WEIGHTS_NAME, run_folder / BEST_NAME)
    print(f"{run_folder}: resume it with the options of the session")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    before = commands.add_parser("pack", help="write data and start weights into a folder")
    before.add_argument("folder", type=Path)
    before.add_argument("--data", type=Path, required=True, help="packed training data")
    before.add_argument("--cache", type=Path, required=True, help="folder for the decoded pictures")
    before.add_argument("--weights", type=Path, required=True, help="weights to train from")
    before.add_argument("--mib", type=int, default=50, help="largest size of the data; default: 50")

    there = commands.add_parser("run", help="tests, benchmark, profile and training on a GPU")
    there.add_argument("folder", type=Path, help="what pack wrote")
    there.add_argument("--out", type=Path, required=True, help="folder for the results")
    there.add_argument("--work", type=Path, default=Path("runs/gpu"), help="run folder; default: runs/gpu")
    there.add_argument("--minutes", type=float, default=8, help="for everything; default: 8")
    there.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a trial; default: cuda")
    there.add_argument("--from", dest="first", choices=PHASES, default=PHASES[-1], help="phase to begin with")
    there.add_argument("--mib", type=int, default=63, help="largest size of all results; default: 63")
    there.add_argument("--only", choices=SHARES, help="one part alone")

    after = commands.add_parser("join", help="make a run folder of the results")
    after.add_argument("results", type=Path)
    after.add_argument("run", type=Path)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
