"""`imcnet benchmark`: the published loop against our engines, and a whole job by its stages."""

import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import training_options as options
from service.cli.serve import WeightsOption
from service.cli.settings import read_settings, require_weights
from service.errors import Misconfigured
from worker.decode import VideoReader
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    import torch

    from model.agreement import Gate
    from model.benchmark import Result
    from model.engine import Engine
    from model.imcnet import IMCNet
    from model.openvino_engine import Precision
    from model.segmenter import Frame, Mask, Segmenter

_AHEAD = 4  # frames and masks that wait before and behind the network, as in the engine


def benchmark(
    video: Annotated[
        Path | None, typer.Argument(metavar="[VIDEO]", help="Frames to segment; by default, a made-up scene.")
    ] = None,
    backbone: Annotated[
        options.Backbone | None,
        typer.Option(help="A network of random weights in place of the weights file."),
    ] = None,
    weights: WeightsOption = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [IMCNET_DEVICE]")] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the square that frames are resized to [IMCNET_INPUT_SIZE]")
    ] = None,
    frames: Annotated[int, typer.Option(min=2, help="How many frames a run segments.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="How often each candidate runs, in turns.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Compare the published loop with our engines on this machine, in turns and in one process.

    A ratio is taken within a round; of ratios and times the median is shown, and the ratios' spread.
    """
    settings = read_settings(WorkerSettings, weights=weights, device=device, input_size=input_size)
    if video is not None and not video.is_file():
        raise Misconfigured(f"There is no file {video}.")
    with tempfile.TemporaryDirectory(prefix="imcnet-") as directory:
        source = video or _scene(Path(directory) / "scene.mp4")
        document = _measure(source, settings, backbone, Path(directory), frames=frames, rounds=rounds)
    typer.echo(_table(document))
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1) + "\n")


def _scene(path: Path) -> Path:
    from service.cli.showcase import write_scene

    write_scene(path, path.with_suffix(".zip"))
    return path


def _measure(
    source: Path,
    settings: WorkerSettings,
    backbone: options.Backbone | None,
    directory: Path,
    *,
    frames: int,
    rounds: int,
) -> dict[str, Any]:
    import torch

    from model.benchmark import compare
    from model.benchmark_report import figures
    from model.segmenter import Segmenter, resolve_device

    if settings.cpu_threads:
        torch.set_num_threads(settings.cpu_threads)
    images = list(_images(source, settings, frames))
    device = resolve_device(settings.device)
    network, name, size = _network(settings, backbone, images)
    results: list[Result] = []
    others, unavailable = _others(network, device, size, directory)
    for count, results in enumerate(
        compare(network, images, device=device, input_size=size, rounds=rounds, others=others), start=1
    ):
        ratios = ", ".join(f"{result.name}: {result.ratios[-1]:.2f}" for result in results[1:])
        typer.echo(f"round {count} of {rounds}, times as fast as the published loop: {ratios}", err=True)
    passing = {result.name: result.speedup for result in results if result.passes}
    segmenter = Segmenter(network, device=str(device), input_size=size)
    engines = {engine.name: engine for engine in (segmenter.engines["exact"], *others)}
    # Where nothing can be compared, the network itself is as right as can be.
    best = max(passing, key=passing.__getitem__, default=segmenter.engines["exact"].name)
    return {
        "backbone": network.config.backbone,
        "weights": name,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "input_size": size,
        "frame": list(images[0].shape[:2]),
        "frames": len(images),
        "rounds": rounds,
        "speedup": max(passing.values(), default=None),
        "engines": [figures(result) for result in results],
        "unavailable": unavailable,
        "job": _whole_job(source, settings, segmenter, engines[best], frames=frames),
    }


def _others(
    network: "IMCNet", device: "torch.device", input_size: int, directory: Path
) -> "tuple[dict[Engine, Gate], dict[str, str]]":
    """All other engines available here, whether or not their masks pass the gate.

    Returns:
        The engines with their gates, and the reasons why others are unavailable, by name.
    """
    from model.agreement import EXACT_GATE, FAST_GATE
    from model.errors import EngineUnavailable

    candidates: dict[str, tuple[Callable[[], Engine], Gate]]
    if device.type == "cuda":
        candidates = {"cuda-graphs-float16": (partial(_cuda, network, device, input_size), FAST_GATE)}
    else:
        openvino = partial(_openvino, network, input_size, directory)
        candidates = {
            "openvino-float32": (partial(openvino, "float32"), EXACT_GATE),
            "openvino-bfloat16": (partial(openvino, "bfloat16"), FAST_GATE),
        }
    found: dict[Engine, Gate] = {}
    unavailable = {}
    for name, (make, gate) in candidates.items():
        try:
            found[make()] = gate
        except (EngineUnavailable, ModuleNotFoundError) as error:
            unavailable[name] = str(error)
    return found, unavailable


def _cuda(network: "IMCNet", device: "torch.device", input_size: int) -> "Engine":
    import torch

    from model.cuda import CudaEngine
    from model.engines import trying_out

    with trying_out():
        engine = CudaEngine(network, device=device)
        blank = engine.encode(torch.zeros(1, 3, input_size, input_size, dtype=torch.uint8))
        engine.decode([blank * network.config.num_frames])
    return engine


def _openvino(network: "IMCNet", input_size: int, directory: Path, precision: "Precision") -> "Engine":
    from model.openvino_engine import Graphs, OpenVINOEngine

    return OpenVINOEngine(Graphs.prepare(network, input_size, directory), precision=precision)


def _network(
    settings: WorkerSettings, backbone: options.Backbone | None, images: "list[Frame]"
) -> "tuple[IMCNet, str, int]":
    from model.benchmark import untrained_network
    from model.config import usual_config
    from model.weights import load_weights

    if backbone is not None:
        size = settings.input_size or 480
        return untrained_network(usual_config(backbone), images, size), "random", size
    network, info = load_weights(require_weights(settings), sha256=settings.weights_sha256)
    return network, info.name, settings.input_size or info.input_size


# ---- A whole job --------------------------------------------------------------------------------------


def _whole_job(
    source: Path, settings: WorkerSettings, segmenter: "Segmenter", engine: "Engine", *, frames: int
) -> dict[str, Any]:
    """From the file to an archive of masks, decoding and writing beside the network as a worker does.

    Returns:
        Seconds by stage, all in all (``wall_s``), and ``overlap``: the stages' sum over all in all. On CUDA,
        ``resize_s`` includes waiting for the device.
    """
    from model.benchmark import Observed
    from model.stages import Stopwatch, WriteBehind, read_ahead
    from worker.png import encode_mask

    segmenter.engines["exact"] = observed = Observed(engine)
    decoding, waiting, writing, putting = (Stopwatch() for _ in range(4))

    def write(archive: zipfile.ZipFile, number: int, mask: "Mask") -> None:
        with writing:
            archive.writestr(f"{number:08d}.png", encode_mask(mask))

    began = time.perf_counter()
    count = 0
    with (
        tempfile.TemporaryFile() as file,
        zipfile.ZipFile(file, "w") as archive,
        closing(read_ahead(decoding.during_each(_images(source, settings, frames)), limit=_AHEAD)) as images,
        WriteBehind(limit=_AHEAD) as behind,
    ):
        segmenting = time.perf_counter()
        for count, mask in enumerate(segmenter.segment(waiting.during_each(images)), start=1):
            with putting:
                behind.put(partial(write, archive, count, mask))
        segmented_s = time.perf_counter() - segmenting - waiting.seconds - putting.seconds
    wall = time.perf_counter() - began
    work = observed.work
    stages = {
        "decode_s": decoding.seconds,
        "resize_s": segmented_s - observed.calls.seconds,
        "encode_s": work.encode_s,
        "window_s": work.window_s,
        "write_s": writing.seconds,
    }
    return {
        "engine": engine.name,
        **stages,
        "wall_s": wall,
        "overlap": sum(stages.values()) / wall,
        "frames_per_second": count / wall,
    }


def _images(source: Path, settings: WorkerSettings, count: int) -> "Iterator[Frame]":
    """A video's first frames.

    Whoever takes them opens and closes the file: it may be another thread, which nobody waits for.
    """
    with VideoReader(
        source, settings.media_limits, max_corrupt_fraction=settings.max_corrupt_fraction
    ) as reader:
        yield from (frame.image for frame in islice(reader, count))


# ---- As text ------------------------------------------------------------------------------------------


def _table(document: dict[str, Any]) -> str:
    from model.benchmark_report import engine_table

    height, width = document["frame"]
    lines = [
        f"{document['backbone']}, weights {document['weights']}, input size {document['input_size']}, on "
        f"{document['device']} with {document['threads']} threads; {document['frames']} frames of "
        f"{width}×{height}, median of {document['rounds']} rounds",
        "",
        *engine_table(document["engines"]),
        *(f"| {name} | unavailable: {reason} |" for name, reason in document["unavailable"].items()),
    ]
    job = document["job"]
    stages = ", ".join(
        f"{name.removesuffix('_s')} {1000 * job[name] / document['frames']:.1f}"
        for name in ("decode_s", "resize_s", "encode_s", "window_s", "write_s")
    )
    lines += [
        "",
        f"A whole job by {job['engine']}, ms a frame by stage: {stages}; from file to archive "
        f"{1000 * job['wall_s'] / document['frames']:.1f}, so {job['overlap']:.2f} stages at a time.",
    ]
    return "\n".join(lines)
