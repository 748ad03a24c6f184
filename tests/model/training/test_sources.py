import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import DatasetError
from model.held_out import HELD_OUT_SEQUENCES
from model.imcnet import IMCNetConfig
from model.training.presets import PRESETS, TrainConfig
from model.training.sources import Dataset, Sources
from tests.training_data import write_davis16, write_duts

NETWORK = IMCNetConfig("resnet18")
STAGE2 = replace(PRESETS["stage2"], size=64)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[Dataset, Path]:
    root = tmp_path_factory.mktemp("data")
    write_davis16(root / "davis", train=2, val=1)
    write_duts(root / "stills", count=4)
    return {"davis16": root / "davis", "duts": root / "stills"}


def test_a_stage_gets_the_data_sets_that_it_names(roots: dict[Dataset, Path]) -> None:
    data = Sources(roots, NETWORK, STAGE2).data()
    assert (len(data.videos), len(data.images), len(data.validation)) == (10, 4, 1)
    window = data.videos.sample(0, np.random.default_rng(0), 64)
    still = data.images.sample(0, np.random.default_rng(0), 64)
    assert (window.frames.shape, still.frames.shape) == ((3, 3, 64, 64), (1, 3, 64, 64))


def test_a_data_set_counts_as_often_as_the_stage_says(roots: dict[Dataset, Path]) -> None:
    stage = replace(STAGE2, videos=(("davis16", 3),), images=(("duts", 2),))
    data = Sources(roots, NETWORK, stage).data()
    assert (len(data.videos), len(data.images)) == (3 * 10, 2 * 4)


def test_windows_are_those_of_the_network(roots: dict[Dataset, Path]) -> None:
    data = Sources(roots, IMCNetConfig("resnet18", num_frames=5, frame_stride=1), STAGE2).data()
    for source in (data.videos, data.validation):
        assert len(source.sample(0, np.random.default_rng(0), 64).frames) == 5


def test_a_stage_reads_nothing_of_the_validation_split(roots: dict[Dataset, Path], tmp_path: Path) -> None:
    shutil.copytree(roots["davis16"], tmp_path / "davis")
    for kind in ("JPEGImages", "Annotations"):
        shutil.rmtree(tmp_path / "davis" / kind / "480p" / "val0")
    (tmp_path / "davis" / "ImageSets" / "2016" / "val.txt").unlink()
    data = Sources({**roots, "davis16": tmp_path / "davis"}, NETWORK, STAGE2).data()
    for source in (data.videos, data.validation):
        for place in range(len(source)):
            source.sample(place, np.random.default_rng(0), 64)


def test_held_out_sequences_validate_and_train_nothing(roots: dict[Dataset, Path]) -> None:
    data = Sources(roots, NETWORK, STAGE2).data()
    assert set(data.validation.names) == {HELD_OUT_SEQUENCES[0]}
    # Two sequences of five frames, but not the third, which is held out.
    assert len(data.videos) == 10


def test_a_data_set_without_held_out_sequences_cannot_validate(tmp_path: Path) -> None:
    write_davis16(tmp_path / "davis")
    (tmp_path / "davis" / "ImageSets" / "2016" / "train.txt").write_text("train0\n")
    with pytest.raises(DatasetError, match="none of the sequences held out for validation: bmx-bumps"):
        Sources({"davis16": tmp_path / "davis"}, NETWORK, replace(STAGE2, images=())).data()


def test_validation_windows_are_not_varied(roots: dict[Dataset, Path]) -> None:
    validation = Sources(roots, NETWORK, STAGE2).data().validation
    samples = [validation.sample(0, np.random.default_rng(seed), 64) for seed in (0, 1)]
    assert torch.equal(samples[0].frames, samples[1].frames)
    assert torch.equal(samples[0].masks, samples[1].masks)


def test_samples_are_the_same_from_memory(roots: dict[Dataset, Path]) -> None:
    read, kept = (Sources(roots, NETWORK, STAGE2, preload=preload).data() for preload in (False, True))
    for source, other in ((read.videos, kept.videos), (read.images, kept.images)):
        first, second = (one.sample(3, np.random.default_rng(5), 64) for one in (source, other))
        assert torch.equal(first.frames, second.frames)
        assert torch.equal(first.masks, second.masks)


def test_what_was_read_for_one_network_serves_another(roots: dict[Dataset, Path]) -> None:
    sources = Sources(roots, NETWORK, STAGE2)
    sources.data()
    # Only the root that validation lists its videos in: all else is there already.
    other = replace(sources, roots={"davis16": roots["davis16"]}, network=IMCNetConfig("resnet18", 5))
    assert len(other.data().images) == 4
    assert len(other.data().videos.sample(0, np.random.default_rng(0), 64).frames) == 5


@pytest.mark.parametrize("missing", ["davis16", "duts"])
def test_a_data_set_without_a_root_is_named(roots: dict[Dataset, Path], missing: str) -> None:
    given = {name: root for name, root in roots.items() if name != missing}
    with pytest.raises(DatasetError, match=f"needs the data set {missing}"):
        Sources(given, NETWORK, STAGE2).data()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("davis16", lambda root: (root / "ImageSets" / "2016" / "train.txt").unlink()),
        ("duts", lambda root: (root / "DUTS-TR" / "DUTS-TR-Mask" / "2.png").unlink()),
    ],
)
def test_what_is_missing_of_a_data_set_is_named(
    name: Dataset, change: Callable[[Path], None], tmp_path: Path
) -> None:
    write_davis16(tmp_path / "davis16")
    write_duts(tmp_path / "duts")
    change(tmp_path / name)
    with pytest.raises(DatasetError, match=r"train\.txt|2\.png"):
        Sources({"davis16": tmp_path / "davis16", "duts": tmp_path / "duts"}, NETWORK, STAGE2).data()


def test_the_first_stage_says_that_it_needs_youtube_vos(roots: dict[Dataset, Path]) -> None:
    stage: TrainConfig = replace(PRESETS["stage1"], size=64)
    with pytest.raises(DatasetError, match="needs the data set youtube_vos"):
        Sources(roots, NETWORK, stage).data()


def test_the_videos_of_youtube_vos_can_be_listed(roots: dict[Dataset, Path], tmp_path: Path) -> None:
    davis = roots["davis16"]
    for kind in ("JPEGImages", "Annotations"):
        for video in ("train0", "train1"):
            target = tmp_path / "vos" / "train" / kind / video
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(davis / kind / "480p" / video)
    (tmp_path / "single.txt").write_text("train1\n")
    stage = replace(PRESETS["stage1"], size=64, videos=(("youtube_vos", 1),))
    both = {**roots, "youtube_vos": tmp_path / "vos"}
    assert len(Sources(both, NETWORK, stage).data().videos) == 10
    assert len(Sources(both, NETWORK, stage, tmp_path / "single.txt").data().videos) == 5
