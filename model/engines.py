"""The engines beside PyTorch's own, which computes in float32: OpenVINO's on a CPU, CUDA graphs on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from model.agreement import FAST_GATE, measure_agreement
from model.engine import Engine, StillEngine
from model.errors import DeviceError, EngineUnavailable
from model.imcnet import IMCNet
from model.segmenter import Segmenter
from model.views import Quality
from model.weights import load_weights
from model.windows import WindowLayout

if TYPE_CHECKING:
    from model.openvino_engine import Precision

ExactBackend = Literal["torch", "openvino"]


def load_segmenter(
    weights: Path,
    quality: Quality,
    *,
    device: str,
    input_size: int | None = None,
    exact_backend: ExactBackend = "torch",
    graphs: Path | None = None,
) -> Segmenter:
    """Load a weights file, and have the engine that a quality needs.

    Args:
        device: As for ``resolve_device``.
        input_size: By default the one that the weights were made for.
        exact_backend: What computes ``exact``.
        graphs: Folder where OpenVINO's graphs are kept; by default ``graphs_beside`` the weights.

    Raises:
        WeightsError: The file cannot be used.
        DeviceError: The device is not there.
        EngineUnavailable: The engine cannot be had.
        ValueError: ``input_size`` is not a positive multiple of 32.
    """
    network, info = load_weights(weights)
    segmenter = Segmenter(network, device=device, input_size=input_size or info.input_size)
    graphs = graphs or graphs_beside(weights)
    if quality == "fast":
        add_fast_engine(segmenter, network, graphs=graphs)
    elif quality == "exact" and exact_backend == "openvino":
        use_openvino(segmenter, network, graphs=graphs)
    return segmenter


def load_still_segmenter(weights: Path, *, device: str, input_size: int | None = None) -> Segmenter:
    """Load a weights file for its still path, which segments each frame by itself, without motion.

    Compared with windows of the same weights, it shows what motion contributes. It has the qualities
    ``exact`` and ``multi_scale``.

    Args:
        device: As for ``resolve_device``.
        input_size: Default: the one that the weights were made for.

    Raises:
        WeightsError: The file cannot be used.
        DeviceError: The device is not available.
        ValueError: ``input_size`` is not a positive multiple of 32.
    """
    network, info = load_weights(weights)
    segmenter = Segmenter(network, device=device, input_size=input_size or info.input_size)
    still = StillEngine(network, device=segmenter.device)
    segmenter.engines = {"exact": still, "multi_scale": still}
    segmenter.layout = WindowLayout(num_frames=1)
    return segmenter


def graphs_beside(weights: Path) -> Path:
    """The folder for graphs unless there is another one; they are told apart by their weights' hash."""
    return weights.parent / "graphs"


def use_openvino(segmenter: Segmenter, network: IMCNet, *, graphs: Path) -> None:
    """Have ``exact`` computed by OpenVINO, in float32.

    Raises:
        EngineUnavailable: It is not installed, does not work here, or flips more than one pixel in 10,000.
    """
    if segmenter.device.type != "cpu":
        raise EngineUnavailable(f"OpenVINO computes on the CPU, not on {segmenter.device}")
    segmenter.engines["exact"] = _openvino(segmenter, network, "float32", graphs)


def add_fast_engine(segmenter: Segmenter, network: IMCNet, *, graphs: Path) -> None:
    """Have ``fast`` computed: in bfloat16 by OpenVINO on a CPU, in float16 by graphs on CUDA.

    Raises:
        EngineUnavailable: There is no such engine here, it does not work, or the IoU of its masks with the
            network's own is below 0.99.
    """
    if segmenter.device.type == "cpu":
        segmenter.engines["fast"] = _openvino(segmenter, network, "bfloat16", graphs)
    else:
        segmenter.engines["fast"] = _cuda(segmenter, network)


def _openvino(segmenter: Segmenter, network: IMCNet, precision: "Precision", graphs: Path) -> Engine:
    try:
        from model.openvino_engine import openvino_engine
    except ModuleNotFoundError as error:
        raise EngineUnavailable(
            f"OpenVINO is not installed, pip install imcnet[cpu] does it: {error}"
        ) from error
    return openvino_engine(network, precision=precision, input_size=segmenter.input_size, cache=graphs)


def _cuda(segmenter: Segmenter, network: IMCNet) -> Engine:
    from model.cuda import CudaEngine

    with trying_out():
        engine = CudaEngine(network, device=segmenter.device)
        beside = Segmenter(network, device=str(segmenter.device), input_size=segmenter.input_size)
        (agreement,) = measure_agreement(beside, engine)
    FAST_GATE.check(agreement)
    return engine


@contextmanager
def trying_out() -> Iterator[None]:
    """Within the block an engine is made and runs for the first time: it compiles, captures, takes memory.

    Raises:
        EngineUnavailable: One of these does not work, or there is no such device.
        torch.AcceleratorError: CUDA itself failed. Whatever else this process asks of the device would fail
            as well, so it has to end.
    """
    try:
        yield
    except torch.AcceleratorError:
        raise
    except (DeviceError, ValueError) as error:
        raise EngineUnavailable(str(error)) from error
    except (RuntimeError, OSError) as error:
        raise EngineUnavailable(f"it does not work here: {error}") from error
