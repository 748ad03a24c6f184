"""The engine of OpenVINO, for CPUs: the network as two graphs, which are built once and kept in files.

Measured beside the network itself, see ``imcnet benchmark``; ONNX Runtime was slower in float32, and has no
bfloat16 on CPUs. INT8 was faster and missed the gate.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

# OpenVINO tells its makers of every import, unless this package of its is missing. We do not phone home.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino

from model.agreement import EXACT_GATE, FAST_GATE, Agreement, Gate, measure_agreement
from model.engine import fold_batch_norms, frame_of, maps_of, window_of
from model.errors import EngineUnavailable
from model.imcnet import FrameFeatures, IMCNet, foreground_probability
from model.preprocess import normalise
from model.segmenter import Segmenter

Precision = Literal["float32", "bfloat16"]

logger = logging.getLogger(__name__)

_FORMAT = 4  # of the files; also to be raised when the network itself changes
_GATES: Mapping[Precision, Gate] = {"float32": EXACT_GATE, "bfloat16": FAST_GATE}
_HINTS: Mapping[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}
_CAPABILITY: Mapping[Precision, str] = {"float32": "FP32", "bfloat16": "BF16"}
_GRAPHS = ("encoder", "window")
_MANIFEST = "manifest.json"
# What reading a manifest raises that is another document.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)


class OpenVINOEngine:
    """Computes graphs of one input size, one frame and one window at a time.

    Args:
        graphs: Those of the network, as :meth:`Graphs.prepare` gives them.
        precision: What is computed in. Inputs and outputs of the graphs are float32 in any case.

    Raises:
        EngineUnavailable: This CPU does not have the precision, or OpenVINO cannot compile the graphs.
    """

    batch, lag = 1, 0

    def __init__(self, graphs: "Graphs", *, precision: Precision) -> None:
        self.device = torch.device("cpu")
        self.name = f"openvino-{precision}"
        _require(precision)
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            self._encoder, self._window = (
                openvino.Core().compile_model(graphs.path(name), "CPU", options).create_infer_request()
                for name in _GRAPHS
            )
        except RuntimeError as error:  # all that OpenVINO raises
            raise EngineUnavailable(f"OpenVINO cannot compile its graphs: {error}") from error

    def encode(self, images: Tensor) -> list[FrameFeatures]:
        return [frame_of(_run(self._encoder, [images]))]

    def decode(self, windows: Sequence[Sequence[FrameFeatures]]) -> Tensor:
        (window,) = windows
        (probabilities,) = _run(self._window, [maps for frame in window for maps in maps_of(frame)])
        return probabilities


def _run(request: openvino.InferRequest, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Raises: RuntimeError: The inputs are not of the graph's shapes and types."""
    request.infer([maps.numpy() for maps in inputs], share_inputs=True)
    # Copied: the next run writes to the same memory.
    return [torch.from_numpy(output.data.copy()) for output in request.output_tensors]


def _require(precision: Precision) -> None:
    """Raises: EngineUnavailable: In this precision, OpenVINO would silently compute in another one."""
    if precision not in _offered():
        raise EngineUnavailable(f"this CPU does not compute in {precision}: {', '.join(_capabilities())}")


def openvino_engine(network: IMCNet, *, precision: Precision, input_size: int, cache: Path) -> OpenVINOEngine:
    """Have the engine of a network, if its masks pass the gate of the precision.

    The graphs are built, and the masks compared, where ``cache`` does not hold them yet: some ten to sixty
    seconds.

    Args:
        cache: Folder for graphs, of any networks.

    Raises:
        EngineUnavailable: This CPU does not have the precision, the masks differ too much from the network's,
            or its graphs cannot be built, stored or compiled.
    """
    _require(precision)
    graphs = Graphs.prepare(network, input_size, cache)
    _GATES[precision].check(graphs.agreement[precision])
    return OpenVINOEngine(graphs, precision=precision)


# ---- Graphs in files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graphs:
    """The graphs of a network for one input size.

    Attributes:
        folder: Holds ``encoder.xml`` and ``window.xml``, each with its ``.bin``, and ``manifest.json``.
        agreement: How the masks compare with those of the network, by precision; only of those that the CPU
            offered on which the graphs were built.
    """

    folder: Path
    agreement: Mapping[Precision, Agreement]

    @classmethod
    def prepare(cls, network: IMCNet, input_size: int, cache: Path) -> Self:
        """Take the graphs from ``cache``, or build them into it.

        What lies there is taken only if it was made from these weights, for this size, by these releases of
        PyTorch and OpenVINO, on a CPU of the same capabilities, and if every byte is still as it was written.
        Graphs that were made of something else lie in folders of their own, and stay. To take graphs, nothing
        has to be written.

        Raises:
            EngineUnavailable: They cannot be built or stored.
        """
        made_of = _made_of(network, input_size)
        folder = cache / f"{_digest(made_of)[:16]}-{input_size}"
        with suppress(OSError, *_DAMAGED):
            return cls._read(folder, made_of)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / ".lock"):  # of several workers, one builds
                try:
                    return cls._read(folder, made_of)
                except (OSError, *_DAMAGED) as error:
                    if folder.exists():
                        logger.warning("The graphs in %s are not used, but built anew: %s", folder, error)
                return cls._build(network, input_size, folder, made_of)
        except OSError as error:
            raise EngineUnavailable(f"its graphs cannot be kept in {cache}: {error}") from error
        except RuntimeError as error:  # all that OpenVINO raises
            raise EngineUnavailable(f"OpenVINO cannot build its graphs: {error}") from error

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.xml"

    @classmethod
    def _read(cls, folder: Path, made_of: Mapping[str, str]) -> Self:
        """Raises: OSError, or one of ``_DAMAGED``: They are not there as they were written."""
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        figures = manifest["agreement"]
        if manifest["sha256"] != _checksum(made_of, _hashes(folder), figures):
            raise ValueError("they are not as they were written")
        agreement: dict[Precision, Agreement] = {name: Agreement(**figures[name]) for name in _offered()}
        shares = [share for each in agreement.values() for share in astuple(each)]
        if agreement.keys() != figures.keys() or not all(0.0 <= share <= 1.0 for share in shares):
            raise ValueError("their masks were not compared as they have to be")
        return cls(folder, agreement)

    @classmethod
    def _build(cls, network: IMCNet, input_size: int, folder: Path, made_of: Mapping[str, str]) -> Self:
        logger.info("Building graphs for OpenVINO in %s", folder)
        shutil.rmtree(folder, ignore_errors=True)  # not written over: an engine may have mapped its files
        folder.mkdir()
        graphs = cls(folder, {})
        segmenter = Segmenter(network, device="cpu", input_size=input_size)
        for name, model in _convert(network, input_size):
            openvino.save_model(model, graphs.path(name), compress_to_fp16=False)
        engines = {precision: OpenVINOEngine(graphs, precision=precision) for precision in _offered()}
        agreement = dict(zip(engines, measure_agreement(segmenter, *engines.values()), strict=True))
        files = _hashes(folder)
        figures = {precision: asdict(each) for precision, each in agreement.items()}
        manifest = {
            "made_of": made_of,
            "files": files,
            "agreement": figures,
            "sha256": _checksum(made_of, files, figures),
        }
        # The last file: without it, what is there counts for nothing.
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        return cls(folder, agreement)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _offered() -> list[Precision]:
    capabilities = _capabilities()
    return [precision for precision in get_args(Precision) if _CAPABILITY[precision] in capabilities]


def _capabilities() -> list[str]:
    """What OpenVINO can do on this CPU."""
    return sorted(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _made_of(network: IMCNet, input_size: int) -> dict[str, str]:
    weights = hashlib.sha256(repr(network.config).encode())
    for name, tensor in sorted(network.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.cpu().contiguous().numpy().data)
    return {
        "weights": weights.hexdigest(),
        "input_size": str(input_size),
        "format": str(_FORMAT),
        "torch": torch.__version__,
        "openvino": openvino.__version__,
        "cpu": " ".join(_capabilities()),
    }


def _checksum(made_of: Mapping[str, str], files: Mapping[str, str], agreement: object) -> str:
    """Of what graphs are made of, what they are, and how their masks compare."""
    return _digest([made_of, files, agreement])


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    names = [f"{graph}.{kind}" for graph in _GRAPHS for kind in ("bin", "xml")]
    hashes = {}
    for name in names:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


# ---- From the network to graphs -----------------------------------------------------------------------


class _Encoder(nn.Module):
    def __init__(self, network: IMCNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        normalised = normalise(images, self.network.config.normalisation)
        return maps_of(self.network.encode_frame(normalised))


class _Window(nn.Module):
    def __init__(self, network: IMCNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, *maps: Tensor) -> Tensor:
        window = window_of(maps, self.network.config.num_frames)
        return foreground_probability(self.network.decode_window(window))


def _convert(network: IMCNet, input_size: int) -> Iterator[tuple[str, openvino.Model]]:
    """Yield the graphs by name, their shapes fixed: OpenVINO chooses its kernels by them."""
    folded = fold_batch_norms(network)
    images = torch.zeros(1, 3, input_size, input_size, dtype=torch.uint8)
    with torch.no_grad():
        maps = _Encoder(folded)(images)
    # Each map its own tensor: an input that stands several times would be taken for one.
    windows = tuple(level.clone() for _ in range(network.config.num_frames) for level in maps)
    for name, module, inputs in (
        (_GRAPHS[0], _Encoder(folded), (images,)),
        (_GRAPHS[1], _Window(folded), windows),
    ):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of PyTorch's and OpenVINO's own code
            program = torch.export.export(module.eval(), inputs)
            model = openvino.convert_model(program)
        model.reshape({place: list(maps.shape) for place, maps in enumerate(inputs)})
        yield name, model
