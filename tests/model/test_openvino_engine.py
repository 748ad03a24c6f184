import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.agreement import EXACT_GATE, Agreement
from model.benchmark import untrained_network
from model.config import usual_config
from model.engine import TorchEngine, maps_of
from model.engines import add_fast_engine, use_openvino
from model.errors import EngineUnavailable
from model.imcnet import IMCNet, IMCNetConfig
from model.scenes import render_scene
from model.segmenter import Segmenter

openvino_engine = pytest.importorskip("model.openvino_engine", reason="needs imcnet[cpu]")
SIZE = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [image for image, _ in render_scene(frames=6, height=90, width=120)]


@pytest.fixture(scope="module")
def network(frames: list[np.ndarray]) -> IMCNet:
    return untrained_network(IMCNetConfig("resnet18"), frames, SIZE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, network: IMCNet) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    openvino_engine.Graphs.prepare(network, SIZE, folder)
    return folder


@pytest.fixture
def own_cache(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "graphs"))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that graphs would be built in: that takes a while, and ``cache`` shows that it works."""
    folders: list[Path] = []

    def build(network: IMCNet, input_size: int, folder: Path, made_of: object) -> object:
        folders.append(folder)
        return openvino_engine.Graphs(folder, {})

    monkeypatch.setattr(openvino_engine.Graphs, "_build", build)
    return folders


def folder_of(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir() and path.name != ".lock")
    return folder


def rewrite(folder: Path, **changed: object) -> None:
    """Change a manifest so that its checksum holds."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changed
    facts = [manifest[name] for name in ("made_of", "files", "agreement")]
    path.write_text(json.dumps(manifest | {"sha256": openvino_engine._digest(facts)}))


def agreements_of(folder: Path) -> dict[str, dict[str, object]]:
    agreements: dict[str, dict[str, object]] = json.loads((folder / "manifest.json").read_text())["agreement"]
    return agreements


def test_in_float32_it_computes_what_the_network_does(
    network: IMCNet, cache: Path, frames: list[np.ndarray]
) -> None:
    segmenter = Segmenter(network, device="cpu", input_size=SIZE)
    reference = TorchEngine(network, device=CPU)
    use_openvino(segmenter, network, graphs=cache)
    engine = segmenter.engines["exact"]
    assert engine.name == "openvino-float32"
    images = torch.randint(0, 256, (3, 1, 3, SIZE, SIZE), dtype=torch.uint8)
    windows = [[each.encode(image)[0] for image in images] for each in (engine, reference)]
    for ours, theirs in zip(*windows, strict=True):
        for left, right in zip(maps_of(ours), maps_of(theirs), strict=True):
            torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        engine.decode(windows[:1]), reference.decode(windows[1:]), atol=1e-3, rtol=1e-3
    )
    masks = list(segmenter.segment(frames))
    segmenter.engines["exact"] = reference
    assert EXACT_GATE.allows(Agreement.of(masks, list(segmenter.segment(frames))))


def test_a_network_with_all_options_passes_the_gate(frames: list[np.ndarray], tmp_path: Path) -> None:
    network = untrained_network(usual_config("efficientnet_lite0"), frames, SIZE)
    segmenter = Segmenter(network, device="cpu", input_size=SIZE)
    reference = segmenter.engines["exact"]
    use_openvino(segmenter, network, graphs=tmp_path)
    images = torch.randint(0, 256, (3, 1, 3, SIZE, SIZE), dtype=torch.uint8)
    engines = (segmenter.engines["exact"], reference)
    assert [engine.name for engine in engines] == ["openvino-float32", "torch-float32"]
    found, expected = (engine.decode([[engine.encode(image)[0] for image in images]]) for engine in engines)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert expected.std() > 0.1


def test_features_of_a_frame_outlive_the_next_frames(network: IMCNet, cache: Path) -> None:
    graphs = openvino_engine.Graphs.prepare(network, SIZE, cache)
    engine = openvino_engine.OpenVINOEngine(graphs, precision="float32")
    (first,) = engine.encode(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
    before = [maps.clone() for maps in maps_of(first)]
    engine.encode(torch.full((1, 3, SIZE, SIZE), 255, dtype=torch.uint8))
    assert all(torch.equal(left, right) for left, right in zip(before, maps_of(first), strict=True))


def test_an_image_of_another_size_is_refused(network: IMCNet, cache: Path) -> None:
    graphs = openvino_engine.Graphs.prepare(network, SIZE, cache)
    engine = openvino_engine.OpenVINOEngine(graphs, precision="float32")
    with pytest.raises(RuntimeError, match="shape"):
        engine.encode(torch.zeros(1, 3, 2 * SIZE, SIZE, dtype=torch.uint8))


def test_graphs_are_built_once_for_all_of_a_networks_engines(
    network: IMCNet, cache: Path, built: list[Path]
) -> None:
    for _ in range(2):
        openvino_engine.Graphs.prepare(network, SIZE, cache)
    assert built == []


def test_other_weights_and_other_sizes_have_graphs_of_their_own(
    network: IMCNet, cache: Path, built: list[Path], make_network: Callable[..., IMCNet]
) -> None:
    openvino_engine.Graphs.prepare(make_network(), SIZE, cache)
    openvino_engine.Graphs.prepare(network, 2 * SIZE, cache)
    assert len({folder_of(cache), *built}) == 3


@pytest.mark.parametrize("name", ["encoder.bin", "window.xml", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_damaged_graphs_are_built_anew(
    network: IMCNet,
    own_cache: Path,
    built: list[Path],
    name: str,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = folder_of(own_cache) / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            data[: len(data) // 2] + (b"\0" + data[len(data) // 2 + 1 :]) * (damage == "changed")
        )
    with caplog.at_level(logging.WARNING):
        openvino_engine.Graphs.prepare(network, SIZE, own_cache)
    assert built == [folder_of(own_cache)]
    assert "built anew" in caplog.text


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (openvino_engine.openvino, "__version__", "2020.1"),
        (torch, "__version__", "1.0"),
        (openvino_engine, "_capabilities", lambda: ["FP32"]),
        (openvino_engine, "_FORMAT", 0),
    ],
)
def test_graphs_made_by_something_else_are_not_used_and_stay(
    network: IMCNet,
    cache: Path,
    built: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    where: object,
    name: str,
    value: object,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value)
        openvino_engine.Graphs.prepare(network, SIZE, cache)
    assert built == [built[0]] != [folder_of(cache)]
    openvino_engine.Graphs.prepare(network, SIZE, cache)
    assert len(built) == 1


def without_a_precision(agreements: dict[str, dict[str, object]]) -> None:
    agreements.popitem()


def of_another_precision(agreements: dict[str, dict[str, object]]) -> None:
    agreements["int8"] = agreements["float32"]


def with_other_figures(**figures: object) -> Callable[[dict[str, dict[str, object]]], None]:
    return lambda agreements: agreements["float32"].update(figures)


NONSENSE = [
    dict.clear,
    without_a_precision,
    of_another_precision,
    with_other_figures(flipped="0.0"),
    with_other_figures(iou=float("nan")),
    with_other_figures(iou=1.5),
    with_other_figures(flipped=-0.1),
    with_other_figures(more=1),
]


@pytest.mark.parametrize("change", NONSENSE)
def test_comparisons_that_were_never_made_are_made_anew(
    network: IMCNet,
    own_cache: Path,
    built: list[Path],
    change: Callable[[dict[str, dict[str, object]]], None],
) -> None:
    folder = folder_of(own_cache)
    agreements = agreements_of(folder)
    change(agreements)
    rewrite(folder, agreement=agreements)
    openvino_engine.Graphs.prepare(network, SIZE, own_cache)
    assert built == [folder]


def test_a_figure_that_somebody_changed_is_not_believed(
    network: IMCNet, own_cache: Path, built: list[Path]
) -> None:
    path = folder_of(own_cache) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["agreement"]["float32"]["flipped"] += 1e-6
    path.write_text(json.dumps(manifest))
    openvino_engine.Graphs.prepare(network, SIZE, own_cache)
    assert built == [path.parent]


def test_graphs_can_be_taken_from_where_nothing_can_be_written(
    network: IMCNet, own_cache: Path, built: list[Path]
) -> None:
    lock = own_cache / ".lock"
    lock.unlink()
    lock.mkdir()
    openvino_engine.Graphs.prepare(network, SIZE, own_cache)
    assert built == []
    (folder_of(own_cache) / "manifest.json").unlink()
    with pytest.raises(EngineUnavailable, match="cannot be kept in"):
        openvino_engine.Graphs.prepare(network, SIZE, own_cache)


def test_graphs_that_do_not_compile_give_no_engine(network: IMCNet, own_cache: Path) -> None:
    graphs = openvino_engine.Graphs.prepare(network, SIZE, own_cache)
    graphs.path("window").write_text("<net/>")
    with pytest.raises(EngineUnavailable, match="cannot compile its graphs"):
        openvino_engine.OpenVINOEngine(graphs, precision="float32")


def test_where_graphs_cannot_be_kept_there_is_no_engine(network: IMCNet, tmp_path: Path) -> None:
    (tmp_path / "graphs").write_text("a file")
    segmenter = Segmenter(network, device="cpu", input_size=SIZE)
    reference = segmenter.engines["exact"]
    with pytest.raises(EngineUnavailable, match="cannot be kept in"):
        use_openvino(segmenter, network, graphs=tmp_path / "graphs")
    assert segmenter.engines["exact"] is reference


def test_an_engine_whose_masks_are_others_is_not_to_be_had(network: IMCNet, own_cache: Path) -> None:
    folder = folder_of(own_cache)
    agreements = agreements_of(folder)
    agreements["float32"]["flipped"] = 0.01
    rewrite(folder, agreement=agreements)
    with pytest.raises(EngineUnavailable, match=r"masks differ.*1.000% of the pixels"):
        use_openvino(Segmenter(network, device="cpu", input_size=SIZE), network, graphs=own_cache)


def test_a_cpu_without_bfloat16_has_no_fast_engine(
    network: IMCNet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "_capabilities", lambda: ["FP32", "INT8"])
    with pytest.raises(EngineUnavailable, match="does not compute in bfloat16"):
        add_fast_engine(Segmenter(network, device="cpu", input_size=SIZE), network, graphs=cache)


def test_openvino_does_not_phone_home() -> None:
    program = (
        "import sys, model.openvino_engine; "
        "sys.exit(any(name.startswith('openvino_telemetry.') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_quality_without_an_engine_is_refused_at_once(network: IMCNet) -> None:
    with pytest.raises(EngineUnavailable, match="'fast'"):
        Segmenter(network, device="cpu", input_size=SIZE).segment([], quality="fast")
