import json
import multiprocessing
import pickletools
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model.config import IMCNetConfig
from model.errors import CheckpointError, TrainingError
from model.training.recipe import CURVE_NAME, SUMMARY_NAME, phases_from
from model.training.starts import measure_whitening, new_network
from model.training.trainer import (
    BEST_NAME,
    CHECKPOINT_NAME,
    HISTORY_NAME,
    LOG_NAME,
    WEIGHTS_NAME,
    read_history,
)
from model.training.training_log import read_log
from model.weights import init_weights, read_info
from tests.model.training.tiny_recipe import RECIPE, STEPS, Scenes, recipe_run

PHASES = [phase.name for phase in RECIPE.phases]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    init_weights(path, RECIPE.network, seed=0)
    return path


@pytest.fixture(scope="module")
def undisturbed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with one_thread():
        assert recipe_run(folder, start).run()
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """As the command runs a recipe: sums over several threads may differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_in_one_thread(folder: Path, start: Path) -> None:
    torch.set_num_threads(1)
    recipe_run(folder, start).run()


def wait_for(path: Path, process: Any) -> None:
    while not path.exists():
        assert process.is_alive(), f"the training has ended without {path}"
        time.sleep(0.005)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_killed_in_every_phase_ends_with_the_bytes_of_an_undisturbed_one(
    start: Path, undisturbed: Path, tmp_path: Path
) -> None:
    for phase in PHASES:
        process = multiprocessing.get_context("fork").Process(
            target=train_in_one_thread, args=(tmp_path, start)
        )
        process.start()
        wait_for(tmp_path / phase / CHECKPOINT_NAME, process)
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not read_history(tmp_path / phase)[-1:] or read_history(tmp_path / phase)[-1]["step"] < STEPS
    with one_thread():
        assert recipe_run(tmp_path, start).run()
    files = [BEST_NAME, CURVE_NAME, *(f"{phase}/{WEIGHTS_NAME}" for phase in PHASES)]
    files += [f"{phase}/{HISTORY_NAME}" for phase in PHASES]
    for name in files:
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_phases_follow_each_other_in_their_order(undisturbed: Path) -> None:
    log = read_log(undisturbed / LOG_NAME)
    assert [(line["phase"], line["step"]) for line in log] == [(phase, STEPS) for phase in PHASES]
    ends = [load_file(undisturbed / phase / WEIGHTS_NAME) for phase in PHASES]
    for phase, before, after in zip(RECIPE.phases[1:], ends[:-1], ends[1:], strict=True):
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert changed
        assert not phase.trained or all(name.startswith(phase.trained) for name in changed)


def test_batch_norm_and_whitening_never_change(start: Path, undisturbed: Path) -> None:
    first, last = load_file(start), load_file(undisturbed / PHASES[-1] / WEIGHTS_NAME)
    fixed = [name for name in first if name.endswith(("running_mean", "running_var", ".mean", ".variance"))]
    assert any("running" in name for name in fixed)
    assert any("whitening" in name for name in fixed)
    for name in fixed:
        assert torch.equal(first[name], last[name]), name


def test_the_log_says_how_each_phase_goes(undisturbed: Path) -> None:
    lines = {line["phase"]: line for line in read_log(undisturbed / LOG_NAME)}
    assert set(lines["trunk"]["loss"]) == {"stills final", "stills side"}
    assert set(lines["motion"]["loss"]) == {"windows final"}
    assert set(lines["joint"]["loss"]) == {"windows final", "windows side", "stills final", "stills side"}
    for name in ("motion", "joint"):
        assert lines[name]["offsets"] == []
    for line in lines.values():
        assert line["affinity"] is None  # the network has none
        assert line["gradient_norm"] > 0
        assert line["seconds_per_step"] > 0
        assert line["core_seconds_per_step"] > 0
        assert line["steps"] == STEPS


def test_validations_score_both_paths_by_held_out_sequence(undisturbed: Path) -> None:
    for phase in PHASES:
        history = read_history(undisturbed / phase)
        assert [entry["step"] for entry in history] == [2, STEPS]
        for entry in history:
            for path, mean in (("windows", "j"), ("stills", "still_j")):
                assert set(entry[path]) == {"scene 4", "scene 5"}
                assert entry[mean] == pytest.approx(sum(entry[path].values()) / 2)


def test_the_best_weights_are_those_of_the_highest_held_out_j_of_all_phases(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Scores of eight validations: the best comes third, at step 2 of the second phase, and once more later.
    j = iter([0.3, 0.2, 0.6, 0.5, 0.6, 0.1, 0.4, 0.2])
    saved: list[bytes] = []

    def scored(network: torch.nn.Module, held_out: object, size: int) -> Any:
        from model.training.validation import Scores

        saved.append(network.state_dict()["segmentation.predict.weight"].numpy().tobytes())
        value = next(j)
        return Scores({"a": value}, {"a": value})

    monkeypatch.setattr("model.training.trainer.score", scored)
    recipe_run(tmp_path, start).run()
    best = load_file(tmp_path / BEST_NAME)["segmentation.predict.weight"]
    assert best.numpy().tobytes() == saved[2]
    assert saved.count(saved[2]) == 1
    assert "recipe tiny, 3 steps of stills, 3 steps of trunk, from start" in (
        read_info(tmp_path / BEST_NAME).provenance
    )
    assert "Best held-out J: trunk, step 2" in (tmp_path / SUMMARY_NAME).read_text()


def test_curve_and_summary_are_there_at_the_end(undisturbed: Path) -> None:
    with Image.open(undisturbed / CURVE_NAME) as curve:
        assert len(curve.convert("RGB").getcolors(1 << 20) or ()) > 3
    text = (undisturbed / SUMMARY_NAME).read_text()
    assert [line.split()[0] for line in text.splitlines()[1:5]] == PHASES
    assert "scene 4" in text


def test_a_run_that_stops_early_resumes_to_the_same_weights(
    start: Path, undisturbed: Path, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, phases=RECIPE.phases[:1])
    stops = 0
    with one_thread():
        while not recipe_run(tmp_path, start, recipe=recipe).run(seconds=0):
            stops += 1
    assert stops == STEPS - 1
    name = f"{PHASES[0]}/{WEIGHTS_NAME}"
    assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()
    assert [line["step"] for line in read_log(tmp_path / LOG_NAME)] == [1, 2, 3]


def test_earlier_phases_can_be_skipped(start: Path, tmp_path: Path) -> None:
    recipe_run(tmp_path, start, first="joint").run()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"joint"}
    with pytest.raises(CheckpointError, match="first 'joint', not 'motion'"):
        recipe_run(tmp_path, start, first="motion")


def test_a_phase_that_is_not_there_is_refused() -> None:
    with pytest.raises(TrainingError, match="no phase fine; there are stills, trunk, motion, joint"):
        phases_from(RECIPE, "fine")


def test_phases_are_skipped_only_with_weights_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="phase motion needs weights to start from"):
        recipe_run(tmp_path, None, first="motion")


def test_weights_of_another_network_are_no_start(tmp_path: Path) -> None:
    other = tmp_path / "resnet18.safetensors"
    init_weights(other, IMCNetConfig("resnet18"), seed=0)
    with pytest.raises(TrainingError, match="but the recipe trains"):
        recipe_run(tmp_path / "run", other).run()


def test_a_checkpoint_names_no_module_of_ours(undisturbed: Path) -> None:
    with zipfile.ZipFile(undisturbed / "joint" / CHECKPOINT_NAME) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        names = [value for code, value, _ in pickletools.genops(archive.read(name)) if code.name == "GLOBAL"]
    assert names
    assert all(str(name).startswith(("torch", "collections ")) for name in names)


def test_whitening_is_measured_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STILLS": 4, "SIZE": 64, "BATCH": 2}.items():
        monkeypatch.setattr(f"model.training.starts._WHITENING_{name}", value)
    stills = Scenes([6, 7], num_frames=1)
    found = []
    for _ in range(2):
        network = new_network(RECIPE.network, "random", seed=0)
        measure_whitening(network, stills, seed=1)
        found.append({name: tensor for name, tensor in network.state_dict().items() if "whitening" in name})
    assert found[0]
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])
        assert not tensor.eq(tensor.flatten()[0]).all(), name


def test_lines_of_steps_that_are_repeated_are_dropped_from_the_log(tmp_path: Path) -> None:
    from model.training.training_log import TrainingLog

    path = tmp_path / LOG_NAME
    lines = [{"phase": phase, "step": step} for phase, step in (("a", 50), ("b", 25), ("b", 50))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "b", "st')
    TrainingLog(path, "b", step=30)
    assert read_log(path) == lines[:2]
    assert path.read_text().endswith("}\n")
