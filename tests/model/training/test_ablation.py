import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.datasets import davis16
from model.errors import CheckpointError
from model.evaluation import paper
from model.imcnet import IMCNetConfig
from model.training.ablation import Ablation, RowFigures, share_steps, stages_of
from model.training.presets import PRESETS, TrainConfig
from model.training.sources import Sources
from model.variants import ROWS
from model.weights import read_info
from tests.training_data import write_davis16, write_duts

SMALL = {"steps": 1, "size": 64, "batch_size": 1, "precision": "float32"}
FIRST = replace(PRESETS["stage1"], videos=(("davis16", 1),), **SMALL)
SECOND = replace(PRESETS["stage2"], image_batches=1, **SMALL)


# -- what a row trains -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "shares"), [(355_000, (200_000, 155_000)), (20_000, (11_268, 8_732)), (3, (2, 1)), (2, (1, 1))]
)
def test_the_stages_share_steps_as_in_the_paper(steps: int, shares: tuple[int, int]) -> None:
    assert share_steps(steps) == shares


def test_two_stages_need_two_steps() -> None:
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        share_steps(1)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_trains_both_stages_unless_its_name_says_otherwise(name: str) -> None:
    expected: dict[str, tuple[TrainConfig, ...]] = {
        "stage1_only": (FIRST,),
        "no_joint": (FIRST, replace(SECOND, images=())),
    }
    assert stages_of(ROWS[name], (FIRST, SECOND)) == expected.get(name, (FIRST, SECOND))


def test_every_row_has_figures_of_the_paper() -> None:
    assert set(paper.DAVIS16_VAL) == set(ROWS)


# -- training and measuring ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_davis16(root / "davis", frames=3)
    write_duts(root / "stills", count=2)
    return root


def ablation(data: Path, folder: Path, stages: tuple[TrainConfig, TrainConfig] = (FIRST, SECOND)) -> Ablation:
    roots = {"davis16": data / "davis", "duts": data / "stills"}
    return Ablation(
        stages,
        Sources(roots, IMCNetConfig(), stages[0]),  # type: ignore[arg-type]
        davis16(data / "davis", "val"),
        backbone="resnet18",
        backbone_weights="random",
        folder=folder,
        device=torch.device("cpu"),
    )


ASKED_FOR = ("stage1_only", "full", "multi_scale")


@pytest.fixture(scope="module")
def figures(data: Path, folder: Path) -> list[RowFigures]:
    return [ablation(data, folder).run(name) for name in ASKED_FOR]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


def test_rows_are_trained_and_measured_and_stages_in_common_are_trained_once(
    figures: list[RowFigures], folder: Path
) -> None:
    assert tuple(row.row for row in figures) == ASKED_FOR
    assert all(0 <= value <= 1 for row in figures for value in (row.j_mean, row.f_mean))
    found = {str(path.relative_to(folder)) for path in folder.glob("*/*")}
    stages = {"full/stage1", "full/stage2"}
    assert found == stages | {f"{name}/figures.json" for name in ASKED_FOR}
    info = read_info(folder / "full" / "stage2" / "weights.safetensors")
    assert info.config == IMCNetConfig("resnet18")
    assert (info.input_size, info.provenance) == (64, "ablation: 2 steps from random weights")


def test_a_row_that_is_there_is_not_made_again(data: Path, folder: Path, figures: list[RowFigures]) -> None:
    path = folder / "full" / "figures.json"
    path.write_text(json.dumps({"j_mean": 0.25, "f_mean": 0.5, "sequences": ["val0"]}))
    row = ablation(data, folder).run("full")
    assert (row.j_mean, row.f_mean) == (0.25, 0.5)


def test_a_row_that_was_measured_on_other_sequences_is_measured_but_not_trained_again(
    data: Path, folder: Path, figures: list[RowFigures]
) -> None:
    path = folder / "full" / "figures.json"
    path.write_text(json.dumps({"j_mean": 7, "f_mean": 7, "sequences": ["another"]}))
    weights = folder / "full" / "stage2" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    assert ablation(data, folder).run("full").j_mean <= 1
    assert json.loads(path.read_text())["sequences"] == ["val0"]
    assert weights.stat().st_mtime_ns == before


def test_the_folder_of_another_budget_is_refused(data: Path, folder: Path, figures: list[RowFigures]) -> None:
    with pytest.raises(CheckpointError, match="belongs to another run"):
        ablation(data, folder, (FIRST, replace(SECOND, steps=9)))
