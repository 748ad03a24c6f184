import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from model.engine import TorchEngine, frame_of
from model.errors import DeviceError, WeightsError
from model.imcnet import FrameFeatures, IMCNet, IMCNetConfig, foreground_probability
from model.preprocess import normalise, resize_frame
from model.segmenter import Segmenter, resolve_device
from model.views import Quality
from model.weights import init_weights
from model.windows import WindowLayout

Frame = NDArray[np.uint8]
MakeFrames = Callable[..., list[Frame]]

SIZE = 64
VIEWS = {"exact": 1, "multi_scale": 9}
EVERY_QUALITY = pytest.mark.parametrize("quality", ["exact", "multi_scale"])


class Stream:
    """Frames that can be taken once, and that count how many were."""

    def __init__(self, frames: Iterable[Frame]) -> None:
        self.read = 0
        self._frames = iter(frames)

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        frame = next(self._frames)
        self.read += 1
        return frame


@pytest.fixture
def segmenter(network: IMCNet) -> Segmenter:
    return Segmenter(network, device="cpu", input_size=SIZE)


@pytest.fixture
def keys(segmenter: Segmenter) -> Iterator[list[weakref.ref[Tensor]]]:
    """The keys that have been computed, one a frame and view; those still held are alive."""
    encoded: list[weakref.ref[Tensor]] = []

    def remember(module: nn.Module, inputs: object, key: Tensor) -> None:
        encoded.append(weakref.ref(key))

    engine = segmenter.engines["exact"]
    assert isinstance(engine, TorchEngine)
    hook = engine.network.key_encoder.register_forward_hook(remember)
    yield encoded
    hook.remove()


def _mask_of_window(network: IMCNet, frames: list[Frame], indices: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask as the network's own forward gives it, with nothing reused."""
    window = torch.stack([normalise(resize_frame(frames[index], SIZE), "imagenet") for index in indices])
    with torch.inference_mode():
        probability = foreground_probability(network(window.unsqueeze(0)).logits)
    size = frames[0].shape[:2]
    probability = functional.interpolate(probability, size, mode="bilinear", align_corners=False)
    return (probability[0, 0] >= 0.5).numpy()


@pytest.mark.parametrize(
    ("num_frames", "frame_stride", "count"), [(3, 4, 1), (3, 4, 3), (3, 4, 10), (3, 1, 4), (5, 2, 6)]
)
def test_every_frame_gets_the_mask_of_its_window(
    make_network: Callable[..., IMCNet],
    make_frames: MakeFrames,
    num_frames: int,
    frame_stride: int,
    count: int,
) -> None:
    network = make_network(num_frames, frame_stride)
    frames = make_frames(count)
    masks = list(Segmenter(network, device="cpu", input_size=SIZE).segment(iter(frames)))
    layout = WindowLayout(num_frames, frame_stride)
    assert len(masks) == count
    for center, mask in enumerate(masks):
        assert mask.dtype == np.bool_
        expected = _mask_of_window(network, frames, layout.indices(center, count - 1))
        assert np.array_equal(mask, expected)
    assert 0.05 < np.mean(masks) < 0.95


def _mean_of_nine_passes(network: IMCNet, frames: list[Frame], indices: tuple[int, ...]) -> Tensor:
    """The foreground of a window as the paper's starred results have it, pass by pass, nothing reused."""
    passes = []
    for size in (32, 64, 96):  # 352, 480 and 736 for an input size of 480
        for mirror in (lambda maps: maps, lambda maps: maps.flip(-2), lambda maps: maps.flip(-1)):
            images = [
                normalise(resize_frame(frames[index], size), "imagenet", torch.float64) for index in indices
            ]
            probability = foreground_probability(network(mirror(torch.stack(images).unsqueeze(0))).logits)
            passes.append(
                functional.interpolate(
                    mirror(probability), frames[0].shape[:2], mode="bilinear", align_corners=False
                )
            )
    assert len(passes) == 9
    return torch.cat(passes).mean(dim=(0, 1))


def test_multi_scale_is_the_mean_of_nine_passes(
    make_network: Callable[..., IMCNet], make_frames: MakeFrames
) -> None:
    network = make_network(3, 1).double()
    frames = make_frames(3)
    with torch.inference_mode():
        expected = torch.stack(
            [_mean_of_nine_passes(network, frames, i) for i in ((0, 0, 1), (0, 1, 2), (1, 2, 2))]
        )
    segmenter = Segmenter(network, device="cpu", input_size=SIZE)
    # Masks tell a probability apart from a threshold: with one just beside it, to nine digits.
    probability = expected.flatten().kthvalue(expected.numel() // 2).values.item()
    for threshold in (probability - 1e-9, probability + 1e-9):
        masks = np.stack(list(segmenter.segment(frames, threshold=threshold, quality="multi_scale")))
        assert np.array_equal(masks, (expected >= threshold).numpy())
        assert 0.4 < masks.mean() < 0.6


class TopLeftNetwork(IMCNet):
    """Sees foreground in the top left quarter of all that it is shown: it does not turn with the picture."""

    def decode_window(self, window: Sequence[FrameFeatures]) -> Tensor:
        height, width = window[0].pyramid.v2.shape[-2:]
        logits = torch.full((1, 1, height, width), -100.0)
        logits[..., : height // 2, : width // 2] = 100.0
        return logits


@pytest.mark.parametrize(
    ("quality", "expected"),
    [("exact", [[1, 0], [0, 0]]), ("multi_scale", [[1 / 3, 1 / 3], [1 / 3, 0]])],
)
def test_what_is_seen_in_a_mirror_is_turned_back(
    make_frames: MakeFrames, quality: Quality, expected: list[list[float]]
) -> None:
    segmenter = Segmenter(TopLeftNetwork(IMCNetConfig("resnet18")), device="cpu", input_size=SIZE)
    for threshold in (0.05, 0.3, 0.4, 0.95):
        (mask,) = segmenter.segment(make_frames(1, 40, 56), threshold=threshold, quality=quality)
        corners = mask[np.ix_([0, -1], [0, -1])]
        assert np.array_equal(corners, np.array(expected) >= threshold)


@EVERY_QUALITY
def test_masks_come_as_the_frames_do(segmenter: Segmenter, make_frames: MakeFrames, quality: Quality) -> None:
    stream = Stream(make_frames(15))
    masks = segmenter.segment(stream, quality=quality)
    assert stream.read == 0
    read = []
    for _ in masks:
        read.append(stream.read)
    assert read == [min(15, center + 5) for center in range(15)]


@EVERY_QUALITY
def test_each_frame_is_encoded_once_a_view_and_dropped_after_its_last_window(
    segmenter: Segmenter, make_frames: MakeFrames, keys: list[weakref.ref[Tensor]], quality: Quality
) -> None:
    count, margin, views = 14, segmenter.layout.margin, VIEWS[quality]
    masks = segmenter.segment(iter(make_frames(count)), quality=quality)
    for center, _ in enumerate(masks):
        alive = [index for index, key in enumerate(keys) if key() is not None]
        first, stop = max(0, center + 1 - margin), min(count, center + margin + 1)
        assert alive == list(range(views * first, views * stop))
    assert len(keys) == views * count
    assert all(key() is None for key in keys)


class Batches(TorchEngine):
    """Takes batches as on CUDA, on the CPU."""

    def __init__(self, network: IMCNet, batch: int) -> None:
        super().__init__(network, device=torch.device("cpu"))
        self.batch, self.lag = batch, 1
        self.sizes: list[int] = []

    def encode(self, images: Tensor) -> list[FrameFeatures]:
        self.sizes.append(len(images))
        return super().encode(images)


class Flat(Batches):
    """Sees nothing, at once. ``encoded`` and ``decoded`` are its batches, a frame told by its first pixel."""

    def __init__(self, network: IMCNet, batch: int) -> None:
        super().__init__(network, batch)
        self.encoded: list[list[int]] = []
        self.decoded: list[list[int]] = []

    def encode(self, images: Tensor) -> list[FrameFeatures]:
        self.encoded.append([int(image[0, 0, 0]) for image in images])
        return [frame_of([image[None, :1, :1, :1].float()] * 5) for image in images]

    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        self.decoded.append([int(window[len(window) // 2].key) for window in windows])
        return torch.zeros(len(windows), 1, 8, 8)


@EVERY_QUALITY
@pytest.mark.parametrize(("batch", "count"), [(2, 13), (4, 14), (4, 3), (4, 1), (16, 14)])
def test_batches_change_no_mask_and_hold_no_more_than_one_of_them_beyond_a_window(
    network64: IMCNet, make_frames: MakeFrames, quality: Quality, batch: int, count: int
) -> None:
    segmenter = Segmenter(network64, device="cpu", input_size=SIZE)
    frames = make_frames(count)
    expected = list(segmenter.segment(frames, quality=quality))
    segmenter.engines[quality] = engine = Batches(network64, batch)
    stream = Stream(frames)
    for center, mask in enumerate(segmenter.segment(stream, quality=quality)):
        assert np.array_equal(mask, expected[center])
        assert stream.read <= center + segmenter.reads_ahead(quality)
    assert center == count - 1
    assert sum(engine.sizes) == VIEWS[quality] * count
    assert max(engine.sizes) <= batch


@pytest.mark.parametrize(
    ("num_frames", "frame_stride", "batch"), [(3, 4, 8), (7, 6, 8), (3, 1, 1), (5, 2, 3)]
)
def test_it_is_told_how_many_frames_are_read_ahead_of_a_mask(
    make_network: Callable[..., IMCNet],
    make_frames: MakeFrames,
    num_frames: int,
    frame_stride: int,
    batch: int,
) -> None:
    """No more, or frames pile up; and no fewer, or masks and frames wait for each other."""
    network = make_network(num_frames, frame_stride)
    segmenter = Segmenter(network, device="cpu", input_size=32)
    segmenter.engines["exact"] = Flat(network, batch)
    for start in (0, 5):
        stream = Stream(make_frames(70))
        ahead = [
            stream.read - start - count for count, _ in enumerate(segmenter.segment(stream, start=start))
        ]
        assert max(ahead) == segmenter.reads_ahead("exact") == segmenter.layout.margin + 2 * batch


@pytest.mark.parametrize("span", [16, 20])
def test_a_span_by_itself_has_the_batches_that_it_has_within_the_whole(network: IMCNet, span: int) -> None:
    segmenter = Segmenter(network, device="cpu", input_size=32)
    margin = segmenter.layout.margin
    frames = [np.full((32, 32, 3), index, np.uint8) for index in range(50)]

    def batches(first: int, start: int) -> Flat:
        segmenter.engines["exact"] = engine = Flat(network, 8)
        assert (
            len(list(segmenter.segment(frames[first:], start=start, span_frames=span))) == 50 - first - start
        )
        return engine

    whole = batches(0, 0)
    assert {index for batch in whole.decoded for index in batch} == set(range(50))
    for begin in range(span, 50, span):
        part = batches(begin - margin, margin)
        assert part.decoded == [batch for batch in whole.decoded if batch[0] >= begin]
        if span % 8 == 0:
            assert part.encoded == [batch for batch in whole.encoded if batch[0] >= begin - margin]


@pytest.fixture(scope="module")
def whole(network: IMCNet, make_frames: MakeFrames) -> Tensor:
    """The masks of fourteen frames, segmented in one go."""
    segmenter = Segmenter(network, device="cpu", input_size=SIZE)
    return torch.from_numpy(np.stack(list(segmenter.segment(make_frames(14)))))


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (6, 8), (2, 14), (13, 14), (10, None)])
def test_a_span_gets_the_masks_that_it_has_within_the_whole(
    segmenter: Segmenter, make_frames: MakeFrames, whole: Tensor, start: int, stop: int | None
) -> None:
    masks = segmenter.segment(make_frames(14), start=start, stop=stop)
    assert torch.equal(torch.from_numpy(np.stack(list(masks))), whole[start:stop])


def test_a_multi_scale_span_gets_the_masks_that_it_has_within_the_whole(
    segmenter: Segmenter, make_frames: MakeFrames
) -> None:
    whole = list(segmenter.segment(make_frames(14), quality="multi_scale"))
    span = list(segmenter.segment(make_frames(14), start=6, stop=8, quality="multi_scale"))
    assert np.array_equal(span, whole[6:8])
    part = list(segmenter.segment(make_frames(14)[2:12], start=4, stop=6, quality="multi_scale"))
    assert np.array_equal(part, whole[6:8])


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (6, 8), (13, 14)])
def test_a_part_with_its_margins_gets_the_masks_that_it_has_within_the_whole(
    segmenter: Segmenter, make_frames: MakeFrames, whole: Tensor, start: int, stop: int
) -> None:
    margin = segmenter.layout.margin
    first = max(0, start - margin)
    part = make_frames(14)[first : stop + margin]
    masks = segmenter.segment(part, start=start - first, stop=stop - first)
    assert torch.equal(torch.from_numpy(np.stack(list(masks))), whole[start:stop])


def test_a_span_encodes_only_its_frames_and_their_margins(
    segmenter: Segmenter, make_frames: MakeFrames, keys: list[weakref.ref[Tensor]]
) -> None:
    stream = Stream(make_frames(30))
    assert len(list(segmenter.segment(stream, start=10, stop=13))) == 3
    assert stream.read == 17
    assert len(keys) == 17 - 6


def test_an_empty_span_reads_nothing(segmenter: Segmenter, make_frames: MakeFrames) -> None:
    stream = Stream(make_frames(10))
    assert list(segmenter.segment(stream, start=2, stop=2)) == []
    assert stream.read == 0


@pytest.mark.parametrize(("start", "stop", "count"), [(0, 9, 3), (2, 9, 1), (3, None, 0), (7, 9, 0)])
def test_a_stream_that_ends_early_ends_the_masks(
    segmenter: Segmenter, make_frames: MakeFrames, start: int, stop: int | None, count: int
) -> None:
    assert len(list(segmenter.segment(make_frames(3), start=start, stop=stop))) == count


def test_no_frames_give_no_masks(segmenter: Segmenter) -> None:
    assert list(segmenter.segment([])) == []


def test_a_frame_buffer_may_be_used_again(segmenter: Segmenter, make_frames: MakeFrames) -> None:
    frames = make_frames(10, SIZE, SIZE)

    def through_one_buffer() -> Iterator[Frame]:
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield buffer
            buffer[:] = 0

    expected = list(segmenter.segment(frames))
    assert np.array_equal(list(segmenter.segment(through_one_buffer())), expected)


def test_masks_have_the_size_asked_for(segmenter: Segmenter, make_frames: MakeFrames) -> None:
    (mask,) = segmenter.segment(make_frames(1, 40, 56), output_size=(20, 100))
    assert mask.shape == (20, 100)
    (mask,) = segmenter.segment(make_frames(1, 40, 56))
    assert mask.shape == (40, 56)


def test_a_higher_threshold_leaves_less_foreground(segmenter: Segmenter, make_frames: MakeFrames) -> None:
    frames = make_frames(1)
    (low,), (high,) = (segmenter.segment(frames, threshold=threshold) for threshold in (0.3, 0.7))
    assert not (high & ~low).any()
    assert high.sum() < low.sum()
    (everything,) = segmenter.segment(frames, threshold=0.0)
    assert everything.all()


def test_inference_mode_does_not_leak_between_masks(segmenter: Segmenter, make_frames: MakeFrames) -> None:
    for _ in segmenter.segment(make_frames(2)):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold must be within \[0, 1\], got 1.5"),
        ({"threshold": float("nan")}, "got nan"),
        ({"output_size": (0, 5)}, r"output_size must be positive, got \(0, 5\)"),
        ({"quality": "best"}, "quality must be one of fast, exact, multi_scale, got 'best'"),
        ({"start": -1}, "0 <= start <= stop, got -1 and None"),
        ({"span_frames": 0}, "span_frames must be positive, got 0"),
        ({"start": 3, "stop": 2}, "0 <= start <= stop, got 3 and 2"),
    ],
)
def test_options_out_of_range_are_refused_at_once(
    segmenter: Segmenter, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter.segment([], **options)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((40, 56, 3), np.float32), r"frame 1 must be uint8 \(H, W, 3\), got float32"),
        (np.zeros((40, 56), np.uint8), r"frame 1 must be uint8 \(H, W, 3\), got uint8 \(40, 56\)"),
        (np.zeros((40, 56, 4), np.uint8), r"got uint8 \(40, 56, 4\)"),
        (np.zeros((56, 40, 3), np.uint8), r"frame 1 must be \(40, 56, 3\) .*, got \(56, 40, 3\)"),
    ],
)
def test_frames_of_another_kind_are_refused(
    segmenter: Segmenter, make_frames: MakeFrames, frame: NDArray[np.generic], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(segmenter.segment([*make_frames(1), frame]))


@pytest.mark.parametrize("input_size", [0, -32, 100])
def test_an_input_size_off_the_stride_is_refused(network: IMCNet, input_size: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 32, got {input_size}"):
        Segmenter(network, device="cpu", input_size=input_size)


def test_the_network_that_is_given_stays_as_it_is(make_network: Callable[..., IMCNet]) -> None:
    network = make_network().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    Segmenter(network, device="cpu", input_size=SIZE)
    assert all(module.training for module in network.modules())
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_segmenter_is_loaded_from_a_file(tmp_path: Path, make_frames: MakeFrames) -> None:
    path = tmp_path / "untrained.safetensors"
    init_weights(path, IMCNetConfig("resnet18", num_frames=5, frame_stride=2), seed=0)
    segmenter = Segmenter.load(path, device="cpu", input_size=SIZE)
    assert segmenter.layout == WindowLayout(5, 2)
    assert len(list(segmenter.segment(make_frames(2)))) == 2


def test_loading_never_falls_back(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing\.safetensors"):
        Segmenter.load(tmp_path / "missing.safetensors", device="cpu")


def test_auto_is_cuda_where_there_is_any() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_cuda_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DeviceError, match=r"device 'cuda:99' is not there: found \d+ CUDA device"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps"])
def test_other_devices_are_refused_with_those_allowed(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"must be 'auto', 'cpu', 'cuda' or 'cuda:N', got '{name}'"):
        resolve_device(name)


@pytest.mark.gpu
@EVERY_QUALITY
def test_masks_on_the_gpu_are_those_of_the_cpu(
    cuda_device: object, make_network: Callable[..., IMCNet], make_frames: MakeFrames, quality: Quality
) -> None:
    frames = make_frames(8)
    # In float64, where the order of additions on the two devices moves no pixel over the threshold.
    on_cpu, on_gpu = (
        list(
            Segmenter(make_network().double(), device=device, input_size=SIZE).segment(
                frames, quality=quality
            )
        )
        for device in ("cpu", str(cuda_device))
    )
    assert np.array_equal(on_cpu, on_gpu)


class Late(TorchEngine):
    """Its device takes some time for every batch."""

    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        with torch.cuda.device(self.device):
            torch.cuda._sleep(10**8)  # cycles
        return super().decode(windows)


@pytest.mark.gpu
def test_masks_of_another_device_than_the_current_one_are_not_read_before_they_are_there(
    cuda_device: object, make_network: Callable[..., IMCNet], make_frames: MakeFrames
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device alone")
    network, frames = make_network().double(), make_frames(20)
    expected = list(Segmenter(network, device="cpu", input_size=SIZE).segment(frames))
    segmenter = Segmenter(network, device="cuda:1", input_size=SIZE)
    segmenter.engines["exact"] = Late(network, device=segmenter.device)
    with torch.cuda.device(0):
        assert np.array_equal(list(segmenter.segment(frames)), expected)
