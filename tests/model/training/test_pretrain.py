from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from model.backbone import ResNetPyramid, load_backbone
from model.errors import CheckpointError, DatasetError
from model.training.labelled_images import PackedImages, image_folder, random_views
from model.training.pretrain import (
    BACKBONE_NAME,
    CHECKPOINT_NAME,
    PretrainConfig,
    Pretraining,
    learning_rate_factor,
)
from tests.training_data import pack_images

CONFIG = PretrainConfig(size=32, epochs=2, batch_size=8, learning_rate=0.05, save_every=2)


class Stripes(TensorDataset):
    """Noisy stripes, upright (class 0) or lying (class 1)."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % 2
        images = rng.integers(0, 60, (count, 3, 32, 32))
        rows, columns = np.mgrid[:32, :32] // 4 % 2
        images += 150 * np.where(labels[:, None, None, None], rows, columns)
        super().__init__(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def train() -> Stripes:
    return Stripes(44, seed=0)  # 5 batches of 8, and 4 images that fill none


@pytest.fixture(scope="module")
def val() -> Stripes:
    return Stripes(12, seed=1)


def pretraining(folder: Path, config: PretrainConfig, train: Stripes, val: Stripes) -> Pretraining:
    return Pretraining(config, train, val, classes=2, folder=folder, device=torch.device("cpu"))


# -- training --------------------------------------------------------------------------------------------


def test_it_learns_to_tell_classes_apart(train: Stripes, val: Stripes, tmp_path: Path) -> None:
    run = pretraining(tmp_path, replace(CONFIG, epochs=4), train, val)
    untrained = run.accuracy()
    accuracy = run.run()
    assert accuracy >= 0.9 > untrained
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert [entry["step"] for entry in run.history] == [5, 10, 15, 20]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    stop: int, uninterrupted: Path, train: Stripes, val: Stripes, tmp_path: Path
) -> None:
    run = pretraining(tmp_path, CONFIG, train, val)

    def interrupt(*_: object) -> None:
        if run.step == stop:
            raise Interrupted

    run.network.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        run.run()
    pretraining(tmp_path, CONFIG, train, val).run()
    states = [torch.load(folder / CHECKPOINT_NAME, weights_only=True) for folder in (tmp_path, uninterrupted)]
    assert states[0]["history"] == states[1]["history"]
    for name, tensor in states[0]["network"].items():
        assert torch.equal(tensor, states[1]["network"][name]), name
    assert (tmp_path / BACKBONE_NAME).read_bytes() == (uninterrupted / BACKBONE_NAME).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(train: Stripes, val: Stripes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    pretraining(folder, CONFIG, train, val).run()
    return folder


def test_a_backbone_can_start_from_what_was_pretrained(
    uninterrupted: Path, train: Stripes, val: Stripes
) -> None:
    backbone = ResNetPyramid("resnet18")
    load_backbone(backbone, "resnet18", uninterrupted / BACKBONE_NAME)
    trained = pretraining(uninterrupted, CONFIG, train, val).network.backbone
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, backbone.state_dict()[name]), name


def test_another_configuration_is_refused(uninterrupted: Path, train: Stripes, val: Stripes) -> None:
    with pytest.raises(CheckpointError, match="epochs 2, not 3"):
        pretraining(uninterrupted, replace(CONFIG, epochs=3), train, val)


def test_other_classes_are_refused(uninterrupted: Path, train: Stripes, val: Stripes) -> None:
    with pytest.raises(CheckpointError, match="classes 2, not 7"):
        Pretraining(CONFIG, train, val, classes=7, folder=uninterrupted, device=torch.device("cpu"))


def test_fewer_images_than_a_batch_are_refused(train: Stripes, val: Stripes, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"44 images .* too few for batches of 64"):
        pretraining(tmp_path, replace(CONFIG, batch_size=64), train, val)


def test_the_learning_rate_rises_over_a_twentieth_and_falls_to_nothing() -> None:
    factors = [learning_rate_factor(step, 400) for step in range(400)]
    assert factors[:20] == [pytest.approx((step + 1) / 20) for step in range(20)]
    assert factors[19:] == sorted(factors[19:], reverse=True)
    assert 0 < factors[-1] < 1e-4


# -- views -----------------------------------------------------------------------------------------------


def test_views_differ_from_image_to_image_and_repeat_with_the_seed() -> None:
    images = Stripes(2, seed=0).tensors[0][:1].expand(4, -1, -1, -1)
    views = random_views(images, torch.Generator().manual_seed(0), 0.35)
    again = random_views(images, torch.Generator().manual_seed(0), 0.35)
    assert (views.shape, views.dtype) == (images.shape, torch.uint8)
    assert torch.equal(views, again)
    assert not torch.equal(views[0], views[1])


def test_a_view_shows_at_least_the_smallest_crop() -> None:
    """Of a ramp from left to right, a view of the whole width spans it all, mirrored or not."""
    ramp = torch.linspace(60, 190, 32).to(torch.uint8).expand(200, 3, 32, 32)
    views = random_views(ramp, torch.Generator().manual_seed(0), smallest_crop=0.5).float()
    across = views[:, 0, 16]
    spans = (across[:, -1] - across[:, 0]) / 130
    # The narrowest view of half the area is sqrt(0.5) * exp(-0.15) wide; contrast varies by 0.3 either way.
    assert spans.abs().min() > 0.5**0.5 * np.exp(-0.15) * 0.7 - 0.05
    assert spans.abs().max() < 1.3 + 0.05
    assert 60 < int((spans < 0).sum()) < 140


# -- packed images ---------------------------------------------------------------------------------------


def noise(count: int, side: int = 32) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def test_packed_images_come_back_with_their_labels_from_all_files(tmp_path: Path) -> None:
    images = noise(5)
    paths = [
        pack_images(tmp_path / "a.npz", images[:3], [0, 4, 2]),
        pack_images(tmp_path / "b.npz", images[3:], [1, 1]),
    ]
    packed = PackedImages(paths)
    assert (len(packed), packed.classes) == (5, 5)
    assert [packed[index][1] for index in range(5)] == [0, 4, 2, 1, 1]
    for index, image in enumerate(images):
        assert np.array_equal(packed[index][0].permute(1, 2, 0).numpy(), image)


def test_packed_images_must_be_of_one_size(tmp_path: Path) -> None:
    paths = [
        pack_images(tmp_path / "a.npz", noise(2), [0, 1]),
        pack_images(tmp_path / "b.npz", noise(2, 16), [0, 1]),
    ]
    with pytest.raises(DatasetError, match=r"one size in .*a\.npz, .*b\.npz"):
        PackedImages(paths)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    (tmp_path / "short.npz").write_bytes(pack_images(tmp_path / "a.npz", noise(2), [0, 1]).read_bytes()[:-50])
    np.savez(
        tmp_path / "labels.npz", webp=np.zeros(3, np.uint8), offsets=np.array([0, 3]), labels=np.zeros(2)
    )
    for name in ("missing", "text", "other", "short", "labels"):
        with pytest.raises(DatasetError, match=rf"{name}\.npz: not packed images"):
            PackedImages([tmp_path / f"{name}.npz"])


# -- folders ---------------------------------------------------------------------------------------------


def test_images_of_any_size_in_folders_are_brought_to_one(tmp_path: Path) -> None:
    for name, width, height in (("b/wide.png", 80, 40), ("a/tall.jpg", 30, 90)):
        path = tmp_path / name
        path.parent.mkdir()
        Image.new("L", (width, height), 77).save(path)
    folder = image_folder(tmp_path, 32)
    assert folder.classes == ["a", "b"]
    for image, label in (folder[0], folder[1]):
        assert isinstance(image, Tensor)
        assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
        assert image.float().mean() == 77
        assert label in (0, 1)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="class"):
        image_folder(tmp_path, 32)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.jpg").write_text("text")
    with pytest.raises(DatasetError, match=r"broken\.jpg"):
        image_folder(tmp_path, 32)[0]
