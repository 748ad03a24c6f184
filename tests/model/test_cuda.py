import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cuda import CudaEngine, bucket_of, pad
from model.engine import fold_batch_norms, frame_of, maps_of
from model.errors import DeviceError
from model.imcnet import IMCNet, foreground_probability
from model.preprocess import normalise
from model.scenes import render_scene
from model.shipped import SHIPPED_WEIGHTS
from model.weights import WeightsInfo, load_weights, save_weights

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 64
CPU = torch.device("cpu")
HALVES = [torch.float16, torch.bfloat16]
# Against the network by itself, whose batches and memory are ordered otherwise. In float64, the engine would
# be as far from it as it is itself (4e-6 and 3e-6, the worst of all variants).
ROUNDING = 1e-5
# Of probabilities, against float32 on the CPU. There, 16 bit alone cost up to 0.003 and 0.038.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
PROGRAM = """
import sys, torch
from model.cuda import CudaEngine
from model.engine import maps_of
from model.weights import load_weights
images, results, dtype, *weights = sys.argv[1:]
found = []
for path in weights:
    network, _ = load_weights(path)
    engine = CudaEngine(network, device=torch.device("cpu"), dtype=getattr(torch, dtype), capture="eager")
    frames = engine.encode(torch.load(images))
    found.append((maps_of(frames[0])[0], engine.decode([frames])))
torch.save(found, results)
"""


def _engine(network: IMCNet, **changed: object) -> CudaEngine:
    """On the CPU, in float32."""
    options = {"device": CPU, "dtype": torch.float32, "batch": 4, "capture": "eager", **changed}
    return CudaEngine(network, **options)


@pytest.fixture(scope="module")
def engine(network: IMCNet) -> CudaEngine:
    return _engine(network)


def _images(count: int, height: int = SIZE, width: int = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def _probability(network: IMCNet, window: Sequence[Tensor]) -> Tensor:
    """Of a window of images, as the network computes it by itself, with nothing reused."""
    windows = torch.stack([normalise(image, network.config.normalisation) for image in window]).unsqueeze(0)
    return foreground_probability(network(windows).logits)


def _iou(one: Tensor, other: Tensor) -> float:
    masks: list[NDArray[np.bool_]] = [(probability >= 0.5).cpu().numpy() for probability in (one, other)]
    union = np.logical_or(*masks).sum()
    assert union, "two empty masks agree on nothing"
    return float(np.logical_and(*masks).sum() / union)


def _scene(count: int, size: int) -> Tensor:
    """Every fourth image of a scene, in which the shipped weights find an object: ``(count, 3, S, S)``."""
    scene = render_scene(frames=4 * count - 3, height=size, width=size, seed=0)
    images = [torch.from_numpy(image).permute(2, 0, 1) for image, _ in scene]
    return torch.stack(images[::4])


# ---- Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(1, [1]), (4, [1, 2, 4, 4]), (6, [1, 2, 4, 4, 6, 6]), (8, [1, 2, 4, 4, 8, 8, 8, 8])],
)
def test_buckets_are_the_powers_of_two_and_the_batch_itself(batch: int, expected: list[int]) -> None:
    assert [bucket_of(count, batch) for count in range(1, batch + 1)] == expected


def test_a_batch_is_filled_up_by_its_last_entry() -> None:
    assert pad("abc", 4) == ["a", "b", "c", "c"]
    assert pad("abcd", 4) == ["a", "b", "c", "d"]
    assert pad("a", 4) == ["a"] * 4


# ---- Against the network by itself --------------------------------------------------------------------


def test_the_engine_says_what_it_is(engine: CudaEngine) -> None:
    assert (engine.name, engine.device, engine.batch) == ("cpu-eager-float32", CPU, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_frames_are_encoded_as_by_the_network(network: IMCNet, engine: CudaEngine, count: int) -> None:
    images = _images(count)
    frames = engine.encode(images)
    assert len(frames) == count
    for image, frame in zip(images, frames, strict=True):
        with torch.inference_mode():
            expected = network.encode_frame(normalise(image, "imagenet").unsqueeze(0))
        for level, reference in zip(maps_of(frame), maps_of(expected), strict=True):
            torch.testing.assert_close(level, reference, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_windows_are_segmented_as_by_the_network(network: IMCNet, engine: CudaEngine, count: int) -> None:
    images = _images(4)
    frames = engine.encode(images)
    indices = [(0, 1, 2), (1, 2, 3), (3, 3, 0), (2, 2, 2)][:count]
    probabilities = engine.decode([[frames[index] for index in window] for window in indices])
    assert probabilities.shape == (count, 1, SIZE, SIZE)
    assert probabilities.dtype == torch.float32
    for probability, window in zip(probabilities.split(1), indices, strict=True):
        expected = _probability(network, [images[index] for index in window])
        torch.testing.assert_close(probability, expected, rtol=0, atol=ROUNDING)


def test_batches_are_those_of_the_network_bit_for_bit(network: IMCNet, engine: CudaEngine) -> None:
    """In the same bucket and memory format, nothing is left for rounding to differ by."""
    images, indices = _images(3), [(0, 1, 2), (1, 1, 2), (2, 0, 1)]
    plain = fold_batch_norms(network).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        filled = normalise(images[[0, 1, 2, 2]], "imagenet").contiguous(memory_format=torch.channels_last)
        encoded = maps_of(plain.encode_frame(filled))
        window = []
        for column in zip(*indices, strict=True):
            levels = [
                level[[*column, column[-1]]].contiguous(memory_format=torch.channels_last)
                for level in encoded
            ]
            window.append(frame_of(levels))
        expected = foreground_probability(plain.decode_window(window))[:3]
    frames = engine.encode(images)
    for index, frame in enumerate(frames):
        for level, reference in zip(maps_of(frame), encoded, strict=True):
            assert torch.equal(level[0], reference[index])
    assert torch.equal(engine.decode([[frames[index] for index in window] for window in indices]), expected)


def test_windows_of_five_frames_are_segmented(make_network: Callable[..., IMCNet]) -> None:
    network, images = make_network(num_frames=5), _images(5)
    engine = _engine(network, batch=8)
    probability = engine.decode([engine.encode(images)])
    torch.testing.assert_close(probability, _probability(network, images.unbind()), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("variant", ["no_acm", "no_key_encoder", "fpn", "regular_conv", "no_tsc"])
def test_every_variant_is_segmented(make_network: Callable[..., IMCNet], variant: str) -> None:
    network, images = make_network(variant=variant), _images(3)
    engine = _engine(network)
    probability = engine.decode([engine.encode(images)])
    torch.testing.assert_close(probability, _probability(network, images.unbind()), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("variant", ["full", "no_acm"])
def test_a_network_with_the_motion_cue_is_segmented(
    make_network: Callable[..., IMCNet], variant: str
) -> None:
    network = make_network(backbone="efficientnet_lite0", variant=variant)
    engine, images = _engine(network), _images(3)
    probability = engine.decode([engine.encode(images)])
    expected = _probability(network, images.unbind())
    torch.testing.assert_close(probability, expected, rtol=0, atol=20 * ROUNDING)  # 50 layers, and whitening
    assert expected.std() > 0.05


def test_sizes_can_change_from_batch_to_batch(network: IMCNet, engine: CudaEngine) -> None:
    for height, width in [(64, 64), (96, 96), (64, 96), (64, 64)]:
        images = _images(3, height, width)
        probability = engine.decode([engine.encode(images)])
        torch.testing.assert_close(probability, _probability(network, images.unbind()), rtol=0, atol=ROUNDING)


def test_an_entry_does_not_depend_on_its_batch_mates(engine: CudaEngine) -> None:
    images = _images(3)
    others = torch.cat([images[:1], 255 - images[1:]])
    for level, other in zip(*(maps_of(engine.encode(batch)[0]) for batch in (images, others)), strict=True):
        assert torch.equal(level, other)
    frames = engine.encode(images)
    window, bright, dark = frames, [frames[1]] * 3, engine.encode(0 * images)
    beside_bright, beside_dark = (engine.decode([window, other])[0] for other in (bright, dark))
    assert torch.equal(beside_bright, beside_dark)


def test_results_outlive_later_batches(engine: CudaEngine) -> None:
    images = _images(3)
    frames = engine.encode(images)
    probability = engine.decode([frames])
    held = [level for frame in frames for level in maps_of(frame)] + [probability]
    copies = [tensor.clone() for tensor in held]
    images.zero_()  # nor do they depend on the caller's buffer
    engine.decode([engine.encode(_images(3, seed=1))])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(held, copies, strict=True))


def test_features_hold_no_memory_of_what_filled_up_the_bucket(engine: CudaEngine) -> None:
    level = engine.encode(_images(3))[0].key
    assert level.untyped_storage().nbytes() == 3 * level.nbytes


def test_the_network_is_left_as_it_is(make_network: Callable[..., IMCNet]) -> None:
    network = make_network().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    engine = _engine(network)
    engine.decode([engine.encode(_images(3))])
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_gives_the_masks_of_float32(tmp_path: Path, network: IMCNet, dtype: torch.dtype) -> None:
    """All but CUDA: Triton's interpreter computes the fused convolutions, which the shipped network lacks."""
    images = _scene(3, SIZE)
    torch.save(images, tmp_path / "images.pt")
    info = WeightsInfo("aligned", network.config, trained=False, provenance="a test", licence="CC0-1.0")
    save_weights(tmp_path / "aligned", network, info)
    weights = (SHIPPED_WEIGHTS, tmp_path / "aligned")
    name = str(dtype).removeprefix("torch.")
    subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "images.pt", tmp_path / "results.pt", name, *weights],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    for path, (features, probability) in zip(weights, torch.load(tmp_path / "results.pt"), strict=True):
        assert features.dtype == dtype
        assert probability.dtype == torch.float32
        expected = _probability(load_weights(path)[0], images.unbind())
        torch.testing.assert_close(probability, expected, rtol=0, atol=TOLERANCE[dtype])
        # bfloat16 flips 18 of the shipped network's 687 pixels of foreground: 0.974.
        assert _iou(probability, expected) >= (0.99 if dtype == torch.float16 else 0.95)


# ---- What is refused ----------------------------------------------------------------------------------


def test_a_graph_on_the_cpu_is_refused(network: IMCNet) -> None:
    with pytest.raises(DeviceError, match="needs a CUDA device, got 'cpu' with capture 'graphs'"):
        CudaEngine(network, device=CPU)


@pytest.mark.parametrize("capture", ["graphs", "eager"])
def test_a_cuda_device_that_is_not_there_is_refused(network: IMCNet, capture: str) -> None:
    with pytest.raises(DeviceError, match=r"device 'cuda:99' is not there: found \d+ CUDA device"):
        _engine(network, device=torch.device("cuda:99"), capture=capture)


def test_other_devices_are_refused(network: IMCNet) -> None:
    with pytest.raises(DeviceError, match="needs a CUDA device, got 'meta'"):
        _engine(network, device=torch.device("meta"))


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_on_the_cpu_is_refused(network: IMCNet, dtype: torch.dtype) -> None:
    with pytest.raises(DeviceError, match="in Triton's interpreter only"):
        _engine(network, dtype=dtype)


def test_16_bit_without_triton_is_refused(network: IMCNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "model.triton_deform", raising=False)
    with pytest.raises(DeviceError, match="in 16 bit needs Triton"):
        _engine(network, dtype=torch.float16)


def test_the_engine_is_imported_without_the_kernel() -> None:
    program = "import sys, model.cuda; sys.exit('model.triton_deform' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
    assert importlib.util.find_spec("model.triton_deform")  # or this would prove nothing


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", torch.float64, "dtype must be one of torch.float16, torch.bfloat16, torch.float32, got"),
        ("batch", 0, "batch must be at least 1, got 0"),
        ("capture", "graph", "capture must be one of graphs, eager, got 'graph'"),
    ],
)
def test_other_options_are_refused(network: IMCNet, option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _engine(network, **{option: value})


def test_weights_that_are_not_finite_in_the_engines_type_are_refused(
    make_network: Callable[..., IMCNet],
) -> None:
    network = make_network().double()
    with torch.no_grad():
        network.segmentation.predict.bias.fill_(1e300)
    with pytest.raises(ValueError, match=r"segmentation\.predict\.bias holds .* too large for torch.float32"):
        _engine(network)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (_images(5), "expected 1 to 4 images, got 5"),
        (_images(0), "expected 1 to 4 images, got 0"),
        (_images(1)[0], r"images must be \(B, 3, S, S\) uint8 on the CPU, got \(3, 64, 64\)"),
        (_images(1)[:, :2], r"got \(1, 2, 64, 64\)"),
        (_images(1).float(), "torch.float32 on cpu"),
        (_images(1).to("meta"), "torch.uint8 on meta"),
        (_images(1, 60, 64), "multiples of 32, got 60 x 64"),
    ],
)
def test_other_images_are_refused(engine: CudaEngine, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.encode(images)


def test_other_windows_are_refused(engine: CudaEngine) -> None:
    frames = engine.encode(_images(3))
    (larger,) = engine.encode(_images(1, 96, 96))
    for windows, message in [
        ([], "expected 1 to 4 windows, got 0"),
        ([frames] * 5, "expected 1 to 4 windows, got 5"),
        ([frames, frames[:2]], "a window holds 3 frames, got 2"),
        ([[]], "a window holds 3 frames, got 0"),
        ([[*frames[:2], larger]], "frames must be of one size"),
        ([frames, [larger] * 3], "frames must be of one size"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.decode(windows)


def test_features_of_another_engine_are_refused(network: IMCNet, engine: CudaEngine) -> None:
    images = normalise(_images(3), "imagenet")
    with torch.inference_mode():
        together = network.encode_frame(images)
        frame = network.encode_frame(images[:1])
    with pytest.raises(ValueError, match="one an entry"):
        engine.decode([[together] * 3])
    doubled = frame_of([level.double() for level in maps_of(frame)])
    with pytest.raises(ValueError, match=r"features must be torch\.float32 on cpu, .* got torch\.float64"):
        engine.decode([[doubled] * 3])


# ---- On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["graphs", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_on_a_gpu_masks_are_those_of_float32_on_the_cpu(
    cuda_device: str, capture: str, dtype: torch.dtype
) -> None:
    images = _scene(5, 480)
    network, _ = load_weights(SHIPPED_WEIGHTS)
    engine = _engine(network, device=torch.device(cuda_device), dtype=dtype, batch=8, capture=capture)
    assert engine.name == f"cuda-{capture}-{str(dtype).removeprefix('torch.')}"
    frames = engine.encode(images)
    windows = [(0, 1, 2), (1, 2, 3), (2, 3, 4)]
    probabilities = engine.decode([[frames[index] for index in window] for window in windows]).cpu()
    for probability, window in zip(probabilities.split(1), windows, strict=True):
        expected = _probability(network, [images[index] for index in window])
        torch.testing.assert_close(probability, expected, rtol=0, atol=TOLERANCE[dtype])
        assert _iou(probability, expected) >= 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_graphs_compute_what_eager_mode_does(cuda_device: str, network: IMCNet, dtype: torch.dtype) -> None:
    """Through every bucket, at two sizes, back and forth: graphs share their memory."""
    graphs, eager = (
        _engine(network, device=torch.device(cuda_device), dtype=dtype, capture=capture)
        for capture in ("graphs", "eager")
    )
    held: list[tuple[Tensor, Tensor]] = []
    for seed, (count, size) in enumerate([(1, 64), (4, 96), (3, 64), (2, 96), (1, 64), (4, 64), (3, 96)]):
        images = _images(count, size, size, seed)
        results = []
        for engine in (graphs, eager):
            frames = engine.encode(images)
            results.append(engine.decode([[frame, frames[0], frames[-1]] for frame in frames]))
        held.append((results[0], results[1]))
    tolerance = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    for replayed, launched in held:  # only now: no result may be overwritten by a later replay
        torch.testing.assert_close(replayed, launched, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["graphs", "eager"])
def test_many_uploads_in_a_row_do_not_overwrite_each_other(
    cuda_device: str, network: IMCNet, capture: str
) -> None:
    engine = _engine(network, device=torch.device(cuda_device), capture=capture)
    buffer = torch.empty(4, 3, 480, 480, dtype=torch.uint8)
    encoded = []
    for value in range(12):
        buffer.fill_(20 * value)
        encoded.append(engine.encode(buffer))
    again = []
    for value in range(12):
        torch.cuda.synchronize()
        again.append(engine.encode(buffer.fill_(20 * value)))
    for frames, others in zip(encoded, again, strict=True):
        for level, other in zip(maps_of(frames[0]), maps_of(others[0]), strict=True):
            torch.testing.assert_close(level, other, rtol=0, atol=1e-4)
