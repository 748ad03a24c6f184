import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.errors import CheckpointError, TrainingError
from model.imcnet import IMCNet, IMCNetConfig, Variant
from model.training.learning_rates import parameter_groups
from model.training.presets import PRESETS, Precision, Rates, TrainConfig, rate_factor
from model.training.samples import SampleSource
from model.training.sources import Dataset, Sources
from model.training.trainer import (
    BEST_NAME,
    CHECKPOINT_NAME,
    HISTORY_NAME,
    LOG_NAME,
    WEIGHTS_NAME,
    Training,
    TrainingData,
    require_precision,
)
from model.variants import build_network
from model.weights import WeightsInfo, read_info
from tests.training_data import RenderedWindows, write_davis16, write_duts

ARCHITECTURES = [
    *((variant, 4) for variant in get_args(Variant)),
    *(("full", stages) for stages in (1, 2, 3, 5)),
]
# The softmax over the rows of S does not see what is added to a whole column of it.
WITHOUT_EFFECT = {"affinity.left.bias"}
# What a still does not pass through.
PASSED_BY = ("key_encoder", "affinity", "alignment", "compensation")

CONFIG = TrainConfig(
    steps=6,
    size=64,
    batch_size=2,
    rates=Rates(motion=1e-3, attention=1e-4, backbone=1e-5),
    videos=(("davis16", 1),),
    images=(("duts", 1),),
    image_batches=1,
    schedule="cosine",
    precision="float32",
    save_every=2,
    validate_every=4,
)
NEVER = {"save_every": 1000, "validate_every": 1000}
NOTHING = RenderedWindows([])


@pytest.fixture(scope="module")
def window() -> RenderedWindows:
    return RenderedWindows([0])


@pytest.fixture(scope="module")
def still() -> RenderedWindows:
    return RenderedWindows([1], num_frames=1)


@pytest.fixture(scope="module")
def varied_data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Of files, with everything that is random about samples."""
    root = tmp_path_factory.mktemp("data")
    write_davis16(root / "davis", frames=5)
    write_duts(root / "stills", count=3)
    roots: dict[Dataset, Path] = {"davis16": root / "davis", "duts": root / "stills"}
    return Sources(roots, IMCNetConfig("resnet18"), CONFIG).data()


def new_network(variant: Variant = "full", alignment_stages: int = 4, *, seed: int = 0) -> IMCNet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_network(IMCNetConfig("resnet18", variant=variant, alignment_stages=alignment_stages))


def training(
    folder: Path, config: TrainConfig, data: TrainingData, network: IMCNet | None = None, *, workers: int = 0
) -> Training:
    network = network or new_network()
    info = WeightsInfo("tried", network.config, True, "a test", "CC0-1.0")
    device = torch.device("cpu")
    return Training(network, config, data, info=info, folder=folder, device=device, workers=workers)


def only(videos: SampleSource, images: SampleSource = NOTHING) -> TrainingData:
    return TrainingData(videos, images, validation=videos)


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Equal to the bit, tensors within lists and dicts included."""
    assert type(first) is type(second), where
    if isinstance(first, Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}[{place}]")
    else:
        assert first == second, where


# -- what learns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "alignment_stages"), ARCHITECTURES)
def test_gradients_reach_every_parameter(
    variant: Variant, alignment_stages: int, window: RenderedWindows, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=2, batch_size=1, images=(), rates=Rates(1e-3, 1e-3, 1e-3))
    network = new_network(variant, alignment_stages)
    run = training(tmp_path, config, only(window), network)
    # Two steps: on the first, offsets are zero whatever goes into them, so that AlignmentStage.reduce gets
    # no gradient, and residual branches of the backbone are scaled by zero.
    run.run()
    for name, parameter in network.named_parameters():
        if name not in WITHOUT_EFFECT:
            assert run.optimizer.state[parameter]["exp_avg_sq"].any(), name


def test_stills_move_nothing_that_they_pass_by(
    window: RenderedWindows, still: RenderedWindows, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=2, batch_size=1)
    run = training(tmp_path, config, only(window, still))
    run.run(stop=1)
    before = copy.deepcopy(run.network.state_dict())
    run.run(stop=2)
    for name, parameter in run.network.named_parameters():
        moved = not torch.equal(parameter, before[name])
        if name.startswith(PASSED_BY):
            assert not moved, name
        elif name.startswith(("segmentation", "propagation")):
            assert moved, name


def test_a_network_learns_a_window_by_heart(tmp_path: Path) -> None:
    rates = Rates(motion=1e-3, attention=1e-3, backbone=1e-3)
    config = replace(CONFIG, steps=60, size=128, batch_size=1, rates=rates, ema_decay=0.8, **NEVER)
    # The middle of the scene, for an object of a size that a mask at stride 4 can follow.
    run = training(tmp_path, config, only(RenderedWindows([1], size=256).cropped(128)))
    run.run()
    assert run.history[-1]["j"] > 0.95


# -- learning rates --------------------------------------------------------------------------------------


def test_every_parameter_has_the_learning_rate_of_its_module() -> None:
    network = new_network()
    rates = PRESETS["stage1"].rates
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found: dict[str, float] = {}
    for group in parameter_groups(network, rates):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr"]
    expected = {
        "backbone": 1e-6,
        "key_encoder": 1e-6,
        "affinity": 1e-5,
        "propagation": 1e-5,
        "alignment": 1e-4,
        "compensation": 1e-4,
        "segmentation": 1e-4,
    }
    assert found == {name: expected[name.split(".")[0]] for name in names.values()}


@pytest.mark.parametrize("variant", get_args(Variant))
def test_no_parameter_of_a_variant_is_left_out(variant: Variant) -> None:
    network = new_network(variant)
    groups = parameter_groups(network, CONFIG.rates)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_learning_rates_follow_the_schedule(window: RenderedWindows, tmp_path: Path) -> None:
    config = replace(CONFIG, batch_size=1, images=())
    run = training(tmp_path, config, only(window))
    for step in range(2):
        run.run(stop=step + 1)
        factor = rate_factor("cosine", step, 6)
        assert {group["lr"] for group in run.optimizer.param_groups} == {
            rate * factor for rate in (1e-3, 1e-4, 1e-5)
        }


# -- interruptions ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(varied_data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    training(folder, CONFIG, varied_data).run()
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    workers: int, varied_data: TrainingData, uninterrupted: Path, tmp_path: Path
) -> None:
    for stop in (3, None):  # other weights to start from the second time: they must not matter
        network = new_network(seed=0 if stop else 1)
        training(tmp_path, CONFIG, varied_data, network, workers=workers).run(stop=stop)
    states = [torch.load(folder / CHECKPOINT_NAME, weights_only=True) for folder in (tmp_path, uninterrupted)]
    assert {"network", "average", "optimizer", "history", "step"} <= states[0].keys()
    assert_same(*states)
    for name in (WEIGHTS_NAME, HISTORY_NAME):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_validations_are_kept_as_history(uninterrupted: Path) -> None:
    history = json.loads((uninterrupted / HISTORY_NAME).read_text())
    assert [entry["step"] for entry in history] == [4, 6]
    assert all(0 <= entry["j"] <= 1 and entry["loss"] > 0 for entry in history)


def test_nothing_but_the_results_is_left(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {CHECKPOINT_NAME, WEIGHTS_NAME, BEST_NAME, HISTORY_NAME, LOG_NAME}


def test_a_kill_right_after_the_last_checkpoint_costs_no_result(
    varied_data: TrainingData, uninterrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / CHECKPOINT_NAME).write_bytes((uninterrupted / CHECKPOINT_NAME).read_bytes())
    training(tmp_path, CONFIG, varied_data).run()
    for name in (WEIGHTS_NAME, HISTORY_NAME):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_run_that_has_ended_does_nothing_more(varied_data: TrainingData, uninterrupted: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}
    run = training(uninterrupted, CONFIG, varied_data)
    run.run()
    assert run.step == 6
    assert {path.name: path.stat().st_mtime_ns for path in uninterrupted.iterdir()} == before


def test_the_weights_are_the_average_of_those_of_the_steps(window: RenderedWindows, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=3, batch_size=1, images=(), ema_decay=0.2, save_every=1)
    run = training(tmp_path, config, only(window))
    name = "segmentation.predict.weight"
    expected = None
    for stop in (1, 2, 3):
        run.run(stop=stop)
        now = run.network.state_dict()[name].clone()
        decay = min(0.2, stop / (9 + stop))  # of the first steps, which are averaged over fewer
        expected = now if expected is None else decay * expected + (1 - decay) * now
        torch.testing.assert_close(load_file(tmp_path / WEIGHTS_NAME)[name], expected)
    assert read_info(tmp_path / WEIGHTS_NAME) == run.info


# -- refusals --------------------------------------------------------------------------------------------


def test_a_run_refuses_the_checkpoint_of_another_configuration(
    varied_data: TrainingData, uninterrupted: Path
) -> None:
    other = replace(CONFIG, steps=8, seed=1)
    with pytest.raises(CheckpointError, match="seed 0, not 1; steps 6, not 8"):
        training(uninterrupted, other, varied_data)


def test_a_run_goes_on_from_a_checkpoint_that_knows_no_options(
    tmp_path: Path, window: RenderedWindows, still: RenderedWindows
) -> None:
    config = replace(CONFIG, **NEVER)
    training(tmp_path, config, only(window, still)).save()
    checkpoint = torch.load(tmp_path / CHECKPOINT_NAME, weights_only=True)
    for option in ("normalisation", "whitening", "motion_cue"):
        del checkpoint["network_config"][option]
    torch.save(checkpoint, tmp_path / CHECKPOINT_NAME)
    assert training(tmp_path, config, only(window, still), new_network(seed=1)).step == 0


def test_a_run_refuses_the_checkpoint_of_another_network(
    varied_data: TrainingData, uninterrupted: Path
) -> None:
    with pytest.raises(CheckpointError, match="alignment_stages 4, not 2"):
        training(uninterrupted, CONFIG, varied_data, new_network(alignment_stages=2))


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_run_refuses_a_checkpoint_that_is_damaged(
    content: bytes, window: RenderedWindows, tmp_path: Path
) -> None:
    (tmp_path / CHECKPOINT_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT_NAME}: not a readable checkpoint"):
        training(tmp_path, CONFIG, only(window))


def test_a_run_ends_where_masks_are_no_longer_finite(window: RenderedWindows, tmp_path: Path) -> None:
    run = training(tmp_path, replace(CONFIG, images=()), only(window))
    run.run(stop=1)
    with torch.no_grad():
        run.network.segmentation.predict.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="masks are no longer finite at step 1"):
        run.run()
    saved = torch.load(tmp_path / CHECKPOINT_NAME, weights_only=True)
    assert saved["step"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["network"].values())


def test_a_run_ends_where_gradients_are_not_finite(window: RenderedWindows, tmp_path: Path) -> None:
    run = training(tmp_path, replace(CONFIG, images=()), only(window))
    run.network.segmentation.predict.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = run.network.segmentation.predict.weight.clone()
    with pytest.raises(TrainingError, match="gradients are no longer finite at step 0"):
        run.run()
    assert torch.equal(run.network.segmentation.predict.weight, before)


def test_data_that_would_never_show_a_still_are_refused(
    window: RenderedWindows, still: RenderedWindows, tmp_path: Path
) -> None:
    config = replace(CONFIG, image_batches=None)  # 1 still is less than a batch of 2
    with pytest.raises(TrainingError, match="no image would ever come"):
        training(tmp_path, config, only(window, still)).run()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_arithmetic_that_the_cpu_lacks_is_refused(
    precision: Precision, window: RenderedWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    with pytest.raises(TrainingError, match=f"this CPU has no {precision} arithmetic: take float32"):
        training(tmp_path, replace(CONFIG, precision=precision), only(window))
    require_precision(precision, torch.device("cuda"))


def test_a_cpu_with_bfloat16_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    require_precision("bfloat16", torch.device("cpu"))
    with pytest.raises(TrainingError, match="no float16"):
        require_precision("float16", torch.device("cpu"))


# -- TensorBoard -----------------------------------------------------------------------------------------


def test_tensorboard_is_told_losses_rates_validations_and_masks(
    window: RenderedWindows, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    config = replace(CONFIG, steps=20, images=(), validate_every=20, size=32)
    small = RenderedWindows([0], size=32)
    run = training(tmp_path / "run", config, only(small))
    with SummaryWriter(tmp_path / "events") as events:
        run.run(events=events)
    told = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in told.Scalars("validation/J")] == [
        (entry["step"], pytest.approx(entry["j"])) for entry in run.history
    ]
    (loss,) = told.Scalars("training/loss")
    assert loss.step == 20
    # The log has four digits of each part of the loss.
    assert loss.value == pytest.approx(np.mean([entry["loss"] for entry in run.history]), rel=1e-3)
    for name, peak in (("highest", 1e-3), ("lowest", 1e-5)):
        (rate,) = told.Scalars(f"learning rate/{name}")
        assert rate.value == pytest.approx(peak * rate_factor("cosine", 19, 20))
    assert [image.step for image in told.Images("validation/masks")] == [20]
