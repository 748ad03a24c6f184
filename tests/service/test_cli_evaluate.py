"""`imcnet evaluate` as a user meets it: a dataset, weights or masks in; tables, JSON and pictures out."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.evaluation.motion_set import BACKGROUND_SEQUENCES
from model.held_out import held_out_stills
from tests.packed_data import pack_motion_data, pack_sequence
from tests.sequences import HEIGHT, WIDTH, square, write_sequence
from tests.service.test_cli import error_of, imcnet


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Two validation sequences of five frames, ``dog`` and ``bus``."""
    root = tmp_path / "davis"
    for name in ("dog", "bus"):
        write_sequence(root, [square(left) for left in range(5)], name=name)
    (root / "ImageSets" / "2016").mkdir(parents=True)
    (root / "ImageSets" / "2016" / "val.txt").write_text("dog\nbus\n")
    return root


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Masks for ``davis``: of the dog the truth, of the bus none at all."""
    for name in ("dog", "bus"):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        for left in range(5):
            mask = square(left) if name == "dog" else np.zeros((HEIGHT, WIDTH), np.bool_)
            Image.fromarray(mask).save(folder / f"{left:05d}.png")
    return tmp_path / "results"


def write_attributes(path: Path) -> Path:
    """In the form of DAVIS's db_info.yaml."""
    path.write_text(
        "attributes: [OCC, DEF]\n"
        "sequences:\n"
        "- attributes: [DEF, OCC]\n  eval_t: true\n  name: dog\n  num_frames: 5\n  set: val\n  year: 2016\n"
        "- attributes:\n  - OCC\n  eval_t: true\n  name: bus\n  num_frames: 5\n  set: val\n  year: 2016\n"
        "- attributes: []\n  eval_t: false\n  name: swan\n  num_frames: 9\n  set: train\n  year: 2017\n"
    )
    return path


def test_masks_that_anyone_made_are_scored(davis: Path, results: Path, tmp_path: Path) -> None:
    done = imcnet(
        *("evaluate", "--dataset", "davis16", "--root", davis, "--results", results),
        *("--json", tmp_path / "figures.json", "--attributes", write_attributes(tmp_path / "db_info.yaml")),
        *("--worst", tmp_path / "worst.jpg", "--contact-sheet", tmp_path / "sheet.png"),
        *("--compare-paper", "--paper-row", "l3"),
    )
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    all_right = ["100.0", "100.0", "0.0", "100.0", "100.0", "0.0", "100.0", "18.2", "18.2"]
    assert ["dog", "3", *all_right] in table
    assert ["mean", "50.0", "50.0", "0.0", "50.0", "50.0", "0.0", "50.0", "9.1", "18.2"] in table
    assert ["DEF", "deformation", "1", *all_right] in table
    assert ["J", "mean", "50.0", "81.4", "-31.4"] in table
    assert "2 of the 20 sequences" in done.stdout

    document = json.loads((tmp_path / "figures.json").read_text())
    perfect = {
        "j_mean": 1,
        "j_recall": 1,
        "j_decay": 0,
        "f_mean": 1,
        "f_recall": 1,
        "f_decay": 0,
        "jf_mean": 1,
    }
    change = pytest.approx(1 - 9 / 11)  # of a square of 10 pixels that moves by one
    of_the_dog = {**perfect, "flicker": change, "truth_flicker": change}
    assert document["sequences"]["dog"] == {"frames": 3, **of_the_dog}
    of_the_bus = {**dict.fromkeys(perfect, 0), "flicker": 0, "truth_flicker": change}
    assert document["sequences"]["bus"] == {"frames": 3, **of_the_bus}
    assert {key: document[key] for key in perfect} == {key: value / 2 for key, value in perfect.items()}
    assert document["flicker"] == pytest.approx(document["truth_flicker"] / 2)
    assert document["attributes"]["OCC"]["sequences"] == 2
    assert document["paper"] == {"row": "l3", "j_mean": 0.814, "f_mean": 0.801}
    assert (document["dataset"], document["split"], document["seconds_per_frame"]) == ("davis16", "val", None)
    for picture in ("worst.jpg", "sheet.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 3 * 150


def test_a_network_is_scored_and_its_masks_are_results(
    davis: Path, untrained_weights: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", "--dataset", "davis16", "--root", davis, "--sequences", "dog")
    done = imcnet(
        *(*arguments, "--weights", untrained_weights, "--input-size", 64, "--device", "cpu"),
        *("--save-masks", tmp_path / "masks", "--json", tmp_path / "first.json", "--compare-paper"),
    )
    assert done.returncode == 0, done.stderr
    assert "Segmenting" not in done.stderr  # a progress bar is for terminals
    assert "the weights are random, not trained" in done.stdout
    assert "the paper's backbone is resnet101, ours resnet18" in done.stdout
    assert "the paper's input size is 480, ours 64" in done.stdout

    document = json.loads((tmp_path / "first.json").read_text())
    facts = json.loads(imcnet("weights", "show", untrained_weights).stdout)
    assert document["weights"]["name"] == facts["name"]
    assert document["weights"]["sha256"] == facts["sha256"]
    assert (document["device"], document["input_size"], document["quality"]) == ("cpu", 64, "exact")
    assert document["seconds_per_frame"] > 0
    assert document["paper"]["row"] == "full"

    names = sorted(path.relative_to(tmp_path / "masks") for path in (tmp_path / "masks").rglob("*.png"))
    assert names == [Path("dog") / f"{index:05d}.png" for index in range(5)]
    again = imcnet(*arguments, "--results", tmp_path / "masks", "--json", tmp_path / "second.json")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "second.json").read_text())["sequences"] == document["sequences"]


def test_clips_of_the_motion_set_are_scored_by_kind_on_the_still_path(
    untrained_weights: Path, tmp_path: Path
) -> None:
    pack_motion_data(tmp_path / "data", names=BACKGROUND_SEQUENCES, stills=held_out_stills())
    done = imcnet(
        *("evaluate", "--dataset", "motion", "--root", tmp_path / "data", "--sequences", "crowd-2,plain-1"),
        *("--weights", untrained_weights, "--input-size", 64, "--device", "cpu", "--path", "still"),
        *("--save-clips", tmp_path / "clips", "--save-masks", tmp_path / "masks"),
        *("--json", tmp_path / "figures.json", "--worst", tmp_path / "worst.jpg"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Motion set, in percent")
    assert "exact, still, input size 64" in done.stdout
    assert "2 of the 15 clips were scored" in done.stdout

    document = json.loads((tmp_path / "figures.json").read_text())
    assert (document["dataset"], document["path"]) == ("motion", "still")
    assert document["seconds_per_frame"] > 0
    assert list(document["kinds"]) == ["crowd", "plain"]
    assert document["kinds"]["crowd"] == {
        "sequences": 1,
        **{key: value for key, value in document["sequences"]["crowd-2"].items() if key != "frames"},
    }
    assert document["sequences"]["plain-1"]["frames"] == 11
    assert document["sequences"]["plain-1"]["truth_flicker"] > 0
    assert len(list((tmp_path / "clips" / "JPEGImages" / "480p" / "crowd-2").iterdir())) == 13
    assert len(list((tmp_path / "masks" / "plain-1").iterdir())) == 13


def test_the_held_out_sequences_are_scored_from_packed_data(tmp_path: Path) -> None:
    for folder, name in {"davis16/train": "car-turn", "sequences": "clip-gym-man"}.items():
        archive = pack_sequence(tmp_path / "data" / folder, name).with_suffix(".masks.zip")
        pack_sequence(tmp_path / "data" / folder, "bear")
        with zipfile.ZipFile(archive) as truth:
            truth.extractall(tmp_path / "results" / name)
    done = imcnet(
        *("evaluate", "--dataset", "davis16", "--root", tmp_path / "data", "--split", "held-out"),
        *("--results", tmp_path / "results", "--json", tmp_path / "figures.json"),
    )
    assert done.returncode == 0, done.stderr
    assert "2 of the 9 sequences were scored" in done.stdout
    document = json.loads((tmp_path / "figures.json").read_text())
    assert {name: row["j_mean"] for name, row in document["sequences"].items()} == {
        "car-turn": 1,
        "clip-gym-man": 1,
    }


def test_youtube_objects_is_scored_by_class(tmp_path: Path) -> None:
    root, results = tmp_path / "objects", tmp_path / "results"
    for name, masks in {
        "cat/0001": [square(0), None, square(9)],
        "cat/0002": [square(3)],
        "dog/0001": [square(5)],
    }.items():
        sequence = write_sequence(tmp_path / "made", masks, name=name)
        for kind, paths in (("JPEGImages", sequence.frames), ("Annotations", sequence.masks)):
            (root / kind / name).mkdir(parents=True)
            for path in paths:
                if path is not None:
                    path.rename(root / kind / name / path.name)
        (results / name).mkdir(parents=True)
        for index, mask in enumerate(masks):
            if mask is not None:
                given = square(0) if name.startswith("cat") else square(5)
                Image.fromarray(given).save(results / name / f"{index:05d}.png")
    done = imcnet(
        *("evaluate", "--dataset", "youtube-objects", "--root", root, "--results", results),
        *("--json", tmp_path / "figures.json", "--paper-row", "full"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "figures.json").read_text())
    first, second = (1 + 1 / 19) / 2, 7 / 13
    assert document["sequences"]["cat/0001"] == {"frames": 2, "j_mean": pytest.approx(first)}
    assert document["classes"]["cat"] == {"sequences": 2, "j_mean": pytest.approx((first + second) / 2)}
    assert document["j_mean"] == pytest.approx(((first + second) / 2 + 1) / 2)
    assert document["paper"] == {"row": "full", "j_mean": 0.7}
    assert "2 of the 10 classes" in done.stdout
    assert "F mean" not in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--results", "missing"), "no folder missing"),
        (("--results", ".", "--weights", "w.safetensors"), "--weights means nothing beside --results"),
        (("--results", ".", "--save-masks", "masks"), "--save-masks means nothing beside --results"),
        (("--results", ".", "--worst", "worst.gif"), "worst.gif must end in one of .jpg"),
        (("--results", ".", "--json", "missing/figures.json"), "no folder missing"),
        (("--results", ".", "--sequences", "cat"), "No such sequence: cat; there are dog, bus"),
        (("--results", ".", "--compare-paper"), "give --paper-row: full, multi_scale"),
        (("--results", ".", "--paper-row", "l9"), "no row l9"),
        (("--results", "."), "unknown sequences"),
        (("--results", ".", "--attributes", "notes.txt"), "notes.txt must list `sequences`"),
        (("--save-masks", "."), ". exists already"),
        (("--weights", "missing.safetensors"), "no weights file missing.safetensors"),
        (("--results", ".", "--path", "still"), "--path still means nothing beside --results"),
        (("--path", "still", "--quality", "fast"), "--quality fast means nothing beside --path still"),
        (("--save-clips", "clips"), "--save-clips means nothing beside --dataset davis16"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(
    davis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("attributes: none\n")
    assert said in error_of(imcnet("evaluate", "--dataset", "davis16", "--root", davis, *options))


def test_a_mask_that_is_missing_is_named(davis: Path, results: Path) -> None:
    (results / "bus" / "00002.png").unlink()
    message = error_of(imcnet("evaluate", "--dataset", "davis16", "--root", davis, "--results", results))
    assert "00002.png" in message


def test_attributes_must_cover_the_sequences(davis: Path, results: Path, tmp_path: Path) -> None:
    (tmp_path / "db.yaml").write_text("sequences:\n- {name: dog, attributes: [OCC]}\n")
    options = ("--results", results, "--attributes", tmp_path / "db.yaml")
    message = error_of(imcnet("evaluate", "--dataset", "davis16", "--root", davis, *options))
    assert "db.yaml does not know the sequence bus" in message
