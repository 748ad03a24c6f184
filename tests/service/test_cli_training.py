"""`imcnet train`, `pretrain` and `ablate`.

What ends before any training is told in this process, for a process of its own takes seconds to import torch.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.cli import main
from tests.training_data import pack_images, write_davis16, write_duts

ERROR = "imcnet: error: "


@pytest.fixture
def imcnet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line here; returns what it says, or the one line of its error."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["imcnet", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        if end.value.code in (0, None):
            return said.out
        errors = [line for line in said.err.splitlines() if line.startswith(ERROR)]
        assert (end.value.code, len(errors)) == (2, 1), said.err
        return errors[0].removeprefix(ERROR)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_davis16(root / "davis", train=2, val=2, frames=4)
    write_duts(root / "stills", count=4)
    return root


@pytest.fixture(scope="module")
def options(data: Path) -> tuple[object, ...]:
    """A few seconds of the second stage."""
    return (
        *("train", "--preset", "stage2", "--davis16", data / "davis", "--duts", data / "stills"),
        *(
            "--steps",
            4,
            "--size",
            64,
            "--batch-size",
            2,
            "--image-batches",
            1,
            "--save-every",
            2,
            "--validate-every",
            4,
        ),
        *("--precision", "float32", "--workers", 0, "--device", "cpu"),
    )


SMALL = ("--backbone", "resnet18", "--backbone-weights", "random")


def process(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "service.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def shown(imcnet: Callable[..., str], path: Path) -> dict[str, object]:
    facts: dict[str, object] = json.loads(imcnet("weights", "show", path))
    return facts


# -- train -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(options: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted, in a process of its own."""
    out = tmp_path_factory.mktemp("trained") / "run"
    subprocess.run(process(*options, *SMALL, "--out", out), env=environment(), check=True, timeout=280)
    return out


def test_training_leaves_weights_that_say_what_they_are(imcnet: Callable[..., str], trained: Path) -> None:
    facts = shown(imcnet, trained / "weights.safetensors")
    assert facts["trained"] is True
    assert (facts["name"], facts["licence"]) == ("imcnet-resnet18", "unknown")
    assert facts["provenance"] == "stage2, 4 steps at 64 pixels, from random weights"
    assert [entry["step"] for entry in json.loads((trained / "history.json").read_text())] == [4]


def test_training_tells_tensorboard(trained: Path) -> None:
    pytest.importorskip("tensorboard")
    assert list((trained / "events").glob("events.out.tfevents.*"))


def test_the_same_command_again_changes_nothing(
    imcnet: Callable[..., str], options: tuple[object, ...], trained: Path
) -> None:
    before = (trained / "weights.safetensors").read_bytes()
    assert "weights.safetensors: J 0." in imcnet(*options, *SMALL, "--out", trained)
    assert (trained / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (("--steps", 5), "steps 4, not 5"),
        (("--row", "l2"), "alignment_stages 4, not 2"),
        (("--backbone-weights", "FILE"), "start 'random weights', not 'FILE, SHA-256 "),
    ],
)
def test_the_folder_of_another_run_is_refused(
    changes: tuple[object, ...],
    difference: str,
    imcnet: Callable[..., str],
    options: tuple[object, ...],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from model.backbone import ResNetPyramid, save_backbone

    monkeypatch.chdir(tmp_path)
    save_backbone(Path("FILE"), ResNetPyramid("resnet18"), "resnet18")
    error = imcnet(*options, *SMALL, "--out", trained, *changes)
    assert "belongs to another run" in error
    assert difference in error


def test_a_stage_starts_from_the_weights_of_the_one_before(
    imcnet: Callable[..., str], options: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    start = trained / "weights.safetensors"
    arguments = ("--init", start, "--steps", 1, "--name", "mine", "--licence", "CC-BY-NC-4.0")
    imcnet(*options, *arguments, "--out", tmp_path / "run")
    facts = shown(imcnet, tmp_path / "run" / "weights.safetensors")
    assert (facts["name"], facts["licence"]) == ("mine", "CC-BY-NC-4.0")
    assert "from weights.safetensors, SHA-256 " in str(facts["provenance"])
    # One step at stage 2's rates, of 1e-5 at most: what it started from still shows.
    from safetensors.numpy import load_file

    before, after = load_file(start), load_file(tmp_path / "run" / "weights.safetensors")
    name = "segmentation.predict.weight"
    assert 0 < np.abs(after[name] - before[name]).max() < 2e-5


def test_without_joint_training_no_stills_are_needed(
    imcnet: Callable[..., str], options: tuple[object, ...], tmp_path: Path
) -> None:
    before_duts, after_duts = options[:5], options[7:]
    assert "--duts" not in before_duts + after_duts
    arguments = (*before_duts, *after_duts, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    assert "needs the data set duts" in imcnet(*arguments)
    imcnet(*arguments, "--row", "no_joint")
    assert shown(imcnet, tmp_path / "run" / "weights.safetensors")["name"] == "imcnet-resnet18-no_joint"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (("--preset", "stage3"), "There is no preset stage3; there are stage1, stage2."),
        (("--recipe", "shipped"), "Give either --recipe or --preset."),
        (("--data", "."), "--data needs --recipe."),
        (("--from", "joint"), "--from needs --recipe."),
        (("--row", "l9"), "The paper has no row l9; there are full, multi_scale, no_acm,"),
        (("--row", "stage1_only"), "Row stage1_only ends with stage1."),
        (("--size", 100), "size must be a positive multiple of 32, got 100"),
        (("--steps", 0), "steps must be at least 1, got 0"),
        (("--duts", "missing"), "There is no folder missing."),
        (("--backbone-weights", "missing"), "there is no file missing"),
        (("--init", "missing"), "Give --init or --backbone-weights, not both"),
        (("--device", "cuda:7"), "device 'cuda:7' is not there"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    changes: tuple[object, ...],
    complaint: str,
    imcnet: Callable[..., str],
    options: tuple[object, ...],
    tmp_path: Path,
) -> None:
    assert complaint in imcnet(*options, *SMALL, "--out", tmp_path / "run", *changes)
    assert not (tmp_path / "run").exists()


def test_the_first_stage_names_the_data_set_that_it_needs(
    imcnet: Callable[..., str], options: tuple[object, ...], tmp_path: Path
) -> None:
    error = imcnet(*options, *SMALL, "--preset", "stage1", "--out", tmp_path / "run")
    assert error == "this training needs the data set youtube_vos: say where it lies"


def test_a_schedule_that_would_never_show_a_still_is_refused(
    imcnet: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    sets = ("--davis16", data / "davis", "--duts", data / "stills", "--precision", "float32")
    size = ("--size", 64, "--batch-size", 4, "--workers", 0, "--device", "cpu")
    error = imcnet("train", "--preset", "stage2", *sets, *size, *SMALL, "--out", tmp_path / "run")
    assert "8 videos, 4 images and 0 image batches after each video batch" in error


@pytest.mark.parametrize("changes", [("--row", "l2"), ("--backbone", "resnet34")])
def test_weights_of_another_network_are_no_start(
    changes: tuple[object, ...],
    imcnet: Callable[..., str],
    options: tuple[object, ...],
    untrained_weights: Path,
    tmp_path: Path,
) -> None:
    error = imcnet(*options, "--init", untrained_weights, "--out", tmp_path / "run", *changes)
    assert "alignment_stages=4" in error
    assert "is to be trained" in error


@pytest.mark.processes
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(
    ending: signal.Signals, options: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    command = process(*options, *SMALL, "--out", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    run = subprocess.Popen(
        command,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in the background
    )
    while not checkpoint.exists():
        assert run.poll() is None, run.stderr.read() if run.stderr else ""
        time.sleep(0.05)
    run.send_signal(ending)
    _, said = run.communicate(timeout=60)
    assert "Traceback" not in said
    assert run.returncode != 0
    subprocess.run(command, env=environment(), check=True, timeout=280)
    for name in ("weights.safetensors", "history.json"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.processes
def test_two_processes_train_under_torchrun(
    options: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, *process(*options, *SMALL, "--out", tmp_path / "run")[1:]]
    said = subprocess.run(command, env=environment(), check=True, timeout=280, capture_output=True, text=True)
    assert said.stdout.count("weights.safetensors: J 0.") == 1
    alone, together = (
        json.loads((folder / "history.json").read_text()) for folder in (trained, tmp_path / "run")
    )
    assert [entry["step"] for entry in together] == [entry["step"] for entry in alone]


def test_a_recipe_names_what_it_cannot_take(imcnet: Callable[..., str], tmp_path: Path) -> None:
    recipe = ("train", "--recipe", "shipped", "--out", tmp_path / "run", "--nice", 0)
    data = ("--data", tmp_path)
    assert "There is no recipe best; there are shipped." in imcnet(*recipe, *data, "--recipe", "best")
    assert "--recipe needs --data, a folder of training data; got None." in imcnet(*recipe)
    assert "got missing." in imcnet(*recipe, "--data", "missing")
    assert imcnet(*recipe, *data, "--row", "l2") == "--row needs --preset."
    assert imcnet(*recipe, *data, "--preload") == "--preload needs --preset."
    assert "the recipe has no phase fine; there are stills," in imcnet(*recipe, *data, "--from", "fine")
    assert "davis16: no " in imcnet(*recipe, *data)
    assert not (tmp_path / "run").exists()


def test_a_recipe_trains_in_one_process(
    imcnet: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    error = imcnet("train", "--recipe", "shipped", "--out", tmp_path / "run", "--data", tmp_path, "--nice", 0)
    assert error == "A recipe trains in one process; torchrun is for --preset."


def test_a_training_can_be_limited_to_one_thread_at_low_priority(data: Path, tmp_path: Path) -> None:
    """In a process of its own: a priority, once lowered, stays low."""
    code = (
        "import os, sys, torch; from service.cli.train import _use_machine; _use_machine(1, 19); "
        "print(os.nice(0), torch.get_num_threads())"
    )
    said = subprocess.run([sys.executable, "-c", code], env=environment(), check=True, capture_output=True)
    assert said.stdout.split() == [b"19", b"1"]


# -- pretrain --------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes, light and dark, to train on and to validate with."""
    for split, count in (("train", 6), ("val", 2)):
        for name, level in (("dark", 40), ("light", 210)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 50), (level,) * 3).save(folder / f"{number}.png")
    return tmp_path


PRETRAIN = ("--backbone", "resnet18", "--epochs", 1, "--batch-size", 4, "--workers", 0, "--device", "cpu")


def test_a_pretrained_backbone_is_what_training_can_start_from(
    imcnet: Callable[..., str], options: tuple[object, ...], pictures: Path, tmp_path: Path
) -> None:
    sets = ("--images", pictures / "train", "--val", pictures / "val", "--size", 32)
    said = imcnet("pretrain", *sets, *PRETRAIN, "--out", tmp_path / "backbone")
    backbone = tmp_path / "backbone" / "backbone.safetensors"
    assert f"{backbone}: right about " in said
    imcnet(
        *(*options, "--backbone", "resnet18", "--backbone-weights", backbone),
        *("--steps", 1, "--out", tmp_path / "run"),
    )
    facts = shown(imcnet, tmp_path / "run" / "weights.safetensors")
    assert "from backbone.safetensors, SHA-256 " in str(facts["provenance"])


def test_pretraining_takes_packed_images_too(imcnet: Callable[..., str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("a", 4), ("b", 4), ("val", 2)):
        images = list(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
        pack_images(tmp_path / f"{name}.npz", images, [index % 2 for index in range(count)])
    sets = ("--packed", tmp_path / "a.npz", "--packed", tmp_path / "b.npz", "--val", tmp_path / "val.npz")
    imcnet("pretrain", *sets, *PRETRAIN, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    error = imcnet("pretrain", *sets, *PRETRAIN, "--out", tmp_path / "run", "--size", 64)
    assert "The packed images are 32 pixels wide" in error


def test_pretraining_says_what_is_wrong_with_its_images(
    imcnet: Callable[..., str], pictures: Path, tmp_path: Path
) -> None:
    train, val, out = pictures / "train", pictures / "val", ("--out", tmp_path / "run")
    assert "either --images or --packed" in imcnet("pretrain", "--val", val, *out)
    assert "must be one folder" in imcnet("pretrain", "--images", train, "--val", val, "--val", val, *out)
    assert "There is no folder" in imcnet("pretrain", "--images", train, "--val", tmp_path / "x", *out)
    (val / "dark").rename(val / "dim")
    assert "the same classes" in imcnet("pretrain", "--images", train, "--val", val, *out)
    (tmp_path / "text.npz").write_text("text")
    text = ("--packed", tmp_path / "text.npz", "--val", tmp_path / "text.npz")
    assert "text.npz: not packed images" in imcnet("pretrain", *text, *out)


# -- ablate ----------------------------------------------------------------------------------------------


def ablate(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        *("ablate", "--davis16", data / "davis", "--duts", data / "stills", "--out", out, "--steps", 4),
        *("--first", "stage2", "--second", "stage2", "--size", 64, "--batch-size", 2, "--image-batches", 1),
        *("--precision", "float32"),
        *(*SMALL, "--workers", 0, "--device", "cpu", *more),
    )


def test_rows_are_trained_measured_and_set_beside_the_papers(
    imcnet: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    command = ablate(data, tmp_path / "runs", "--rows", "full,no_tsc", "--sequences", "val1")
    table = imcnet(*command)
    document = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert list(document["rows"]) == ["full", "no_tsc"]
    assert document["rows"]["no_tsc"]["paper"] == pytest.approx({"j_mean": 0.806, "f_mean": 0.793})
    assert (document["sequences"], document["steps"]) == (["val1"], [2, 2])
    for name, ours in document["rows"].items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ") and "…" not in line]
        assert f"{100 * ours['j_mean']:.1f}" in line
        assert f"{100 * ours['paper']['f_mean']:.1f}" in line
    assert "1 of the 20 sequences were measured" in table
    assert "the paper's backbone is resnet101, ours resnet18" in table

    weights = tmp_path / "runs" / "no_tsc" / "stage2" / "weights.safetensors"
    assert shown(imcnet, weights)["config"]["variant"] == "no_tsc"  # type: ignore[index]
    before = weights.stat().st_mtime_ns
    assert imcnet(*command) == table
    assert weights.stat().st_mtime_ns == before
    assert "belongs to another run" in imcnet(*command, "--seed", 5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (("--rows", "full,l9"), "There is no row l9; there are full, multi_scale"),
        (("--sequences", "val7"), "There is no sequence val7; there are val0, val1."),
        (("--first", "stage9"), "There is no preset stage9"),
    ],
)
def test_rows_and_sequences_that_are_not_there_are_named(
    changes: tuple[object, ...], complaint: str, imcnet: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    assert complaint in imcnet(*ablate(data, tmp_path / "runs"), *changes)
    assert not (tmp_path / "runs").exists()
