"""A training run, from its first step to weights; it may be interrupted anywhere and resumes exactly."""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from model.errors import TrainingError
from model.imcnet import IMCNet, IMCNetConfig
from model.preprocess import normalise
from model.training.checkpoint import load_checkpoint, replacing, require_same, save_checkpoint
from model.training.forward_pass import ForwardPass, Measurements, cue_dropped
from model.training.learning_rates import freeze_all_but, parameter_groups, scale_rates
from model.training.losses import final_loss, side_loss
from model.training.presets import Phase, Precision, TrainConfig, rate_factor
from model.training.processes import count, rank, require_equal_shares
from model.training.samples import SampleBatch, SampleSource
from model.training.sampling import Kind
from model.training.steps import JointSteps, MixedSteps, StepBatches, Steps
from model.training.training_log import TrainingLog
from model.training.validation import HeldOut, Scores, examples, score
from model.weights import WeightsInfo, save_weights

if TYPE_CHECKING:  # TensorBoard need not be installed
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT_NAME = "checkpoint.pt"
WEIGHTS_NAME = "weights.safetensors"
BEST_NAME = "best.safetensors"
HISTORY_NAME = "history.json"
LOG_NAME = "log.jsonl"
_LOG_EVERY = 25  # steps
_NAMES: dict[Kind, str] = {"video": "windows", "image": "stills"}
_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from, and the held-out sequences on which it is validated."""

    videos: SampleSource
    images: SampleSource
    validation: HeldOut


@dataclass(frozen=True)
class RunFiles:
    """Files that the phases of a run share.

    Args:
        folder: Folder of ``best.safetensors``, the weights with the highest held-out J, and ``log.jsonl``.
        best_j: Held-out J of the best weights of earlier phases.
    """

    folder: Path
    best_j: float = -1.0


class Training:
    """Trains a network in place; the state is a checkpoint in ``folder``, from which the next run resumes.

    Under ``torchrun``, every process trains its share of each batch on its own device; the first one
    writes the files, and the losses that it logs are those of its share.

    Args:
        network: Starts from the weights that it has, unless the folder holds a checkpoint.
        info: Description for the weights file.
        run: Files shared with other phases; by default those of a run of this one alone, in ``folder``.
        workers: Processes that make samples; 0 makes them in this one.

    Raises:
        CheckpointError: The folder holds the checkpoint of another configuration or network.
        TrainingError: A batch cannot be shared equally among the processes, the data cannot fill it, or the
            device lacks the precision.
    """

    def __init__(
        self,
        network: IMCNet,
        config: TrainConfig | Phase,
        data: TrainingData,
        *,
        info: WeightsInfo,
        folder: Path,
        device: torch.device,
        run: RunFiles | None = None,
        workers: int = 0,
    ) -> None:
        require_precision(config.precision, device)
        self.config, self.data, self.info = config, data, info
        self.folder, self.device, self.workers = folder, device, workers
        self.files = run or RunFiles(folder)
        self.network = network.to(device).to(memory_format=torch.channels_last)
        trained = config.trained if isinstance(config, Phase) else ()
        groups = parameter_groups(network, config.rates, trained)
        freeze_all_but(network, groups)
        self.average = AveragedModel(network, multi_avg_fn=_Average(config.ema_decay), use_buffers=True)
        self.optimizer = torch.optim.Adam(groups, betas=config.betas)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._losses: list[float] = []  # since the last validation
        self._steps = _steps(config, data)
        self._measured = Measurements()
        folder.mkdir(parents=True, exist_ok=True)
        if (path := folder / CHECKPOINT_NAME).exists():
            self._restore(load_checkpoint(path), path)
        self._forward: nn.Module = ForwardPass(network)
        if count() > 1:
            # Stills leave the affinity and the motion compensation without gradients.
            self._forward = DistributedDataParallel(self._forward, find_unused_parameters=bool(config.images))

    @property
    def finished(self) -> bool:
        return self.step == self.config.steps

    def run(
        self, *, stop: int | None = None, seconds: float | None = None, events: "SummaryWriter | None" = None
    ) -> None:
        """Train up to step ``stop``, by default to the end, and write the averaged weights.

        Args:
            seconds: Stop early, after the first step that ends later than this, with a checkpoint.
            events: Receives losses, learning rates, validations and some masks.

        Raises:
            TrainingError: Masks or gradients are no longer finite.
            DatasetError: A picture cannot be read.
        """
        stop = self.config.steps if stop is None else min(stop, self.config.steps)
        if self.finished and not is_finished(self.folder, self.config.steps):
            self.save()  # a kill right after the last checkpoint leaves older weights beside it
        end = None if seconds is None else time.monotonic() + seconds
        log = TrainingLog(self.files.folder / LOG_NAME, self._name, step=self.step) if rank() == 0 else None
        disable = None if rank() == 0 else True  # None: where there is no terminal
        batches = self._steps.load(range(self.step, stop), workers=self.workers)
        with tqdm(total=self.config.steps, initial=self.step, unit="step", disable=disable) as progress:
            for step_batches in batches:
                self._train_step(step_batches, log)
                progress.set_postfix(loss=f"{self._losses[-1]:.3f}", refresh=False)
                progress.update()
                late = end is not None and time.monotonic() > end
                if log is not None and (self._is_logged(self.step) or late or self.step == stop):
                    self._write(log, events)
                if self.step % self.config.validate_every == 0 or self.finished:
                    self._record(events)
                if self.step % self.config.save_every == 0 or self.step == stop or late:
                    self.save()
                if late:
                    return

    def save(self) -> None:
        """Write checkpoint, averaged weights and history; only the first process of a run does."""
        if rank() != 0:
            return
        state = {
            "config": _plain(self.config),
            "network_config": asdict(self.network.config),
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "losses": self._losses,
        }
        save_checkpoint(self.folder / CHECKPOINT_NAME, state)
        save_weights(self.folder / WEIGHTS_NAME, self._averaged(), self.info)
        with replacing(self.folder / HISTORY_NAME) as unfinished:
            unfinished.write_text(json.dumps(self.history, indent=1))

    def validate(self) -> Scores:
        """J of the averaged weights on the held-out sequences."""
        with self._autocast():
            return score(self._averaged(), self.data.validation, self._validation_size)

    def _train_step(self, batches: StepBatches, log: TrainingLog | None) -> None:
        scale_rates(self.optimizer, rate_factor(self.config.schedule, self.step, self.config.steps))
        # Batch norm learns its statistics in the paper's stages only.
        self.network.train(isinstance(self.config, TrainConfig))
        # Stills leave no gradient on what they pass by; zeros instead of None would let Adam's momentum
        # go on moving those parts.
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, float] = {}
        for batch in batches:
            parts = self._losses_of(batch)
            losses |= {f"{_NAMES[batch.kind]} {part}": float(loss.detach()) for part, loss in parts.items()}
            total = torch.stack(list(parts.values())).sum()
            if total.requires_grad:  # stills have no gradients where only the window path trains
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        if not self.scaler.is_enabled():  # it leaves out such steps, of which float16 has some
            self._require_finite("gradients", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update_parameters(self.network)
        self.step += 1
        self._losses.append(sum(losses.values()))
        if log is not None:
            log.add(losses, float(norm))

    def _losses_of(self, batch: SampleBatch) -> dict[str, Tensor]:
        """The parts of a batch's loss."""
        frames = normalise(batch.frames.to(self.device, non_blocking=True), self.network.config.normalisation)
        with self._autocast(), ExitStack() as conditions:
            if batch.kind == "video":
                self._prepare_windows(conditions, len(frames))
            maps = self._forward(batch.kind, frames)
        # Before the loss: cross-entropy takes NaN for a fault of ours, and on CUDA its assertion is final.
        self._require_finite("masks", *(values for values in maps if values is not None))
        final, side = (
            masks.to(self.device, non_blocking=True).float() / 255
            for masks in (batch.masks, batch.side_masks)
        )
        parts = {"final": final_loss(maps.logits, final[:, final.shape[1] // 2])}
        if maps.side_masks is not None:
            parts["side"] = side_loss(maps.side_masks, side, stride=self.config.side_stride)
        return parts

    def _prepare_windows(self, conditions: ExitStack, windows: int) -> None:
        """Measure the next pass of windows if its step is logged, and drop motion cues at random."""
        if rank() == 0 and self._is_logged(self.step + 1):
            conditions.enter_context(self._measured.of(self.network))
        if isinstance(self.config, Phase) and self.config.cue_dropout:
            rng = np.random.default_rng((self.config.seed, self.step, 0, 1))
            dropped = (rng.random(windows) < self.config.cue_dropout).tolist()
            conditions.enter_context(cue_dropped(self.network.get_submodule("cue"), dropped))

    def _require_finite(self, what: str, *values: Tensor) -> None:
        if not all(value.isfinite().all() for value in values):
            raise TrainingError(f"the {what} are no longer finite at step {self.step}")

    def _record(self, events: "SummaryWriter | None") -> None:
        """Validate; keep the weights if they are the best of the run."""
        losses, self._losses = self._losses, []
        if rank() != 0:
            return
        scores = self.validate()
        best = max([self.files.best_j, *(entry["j"] for entry in self.history)])
        entry = {"step": self.step, "loss": float(np.mean(losses)), "j": scores.j, "still_j": scores.still_j}
        self.history.append({**entry, "windows": scores.windows, "stills": scores.stills})
        logger.info(
            "%s step %d: loss %.4f, held-out J of windows %.4f, of stills %.4f", self._name, *entry.values()
        )
        if scores.j > best:
            save_weights(self.files.folder / BEST_NAME, self._averaged(), self.info)
        if events is not None:
            with self._autocast():
                masks = examples(self._averaged(), self.data.validation, self._validation_size)
            events.add_scalar("validation/J", entry["j"], self.step)
            events.add_images("validation/masks", masks, self.step)

    def _write(self, log: TrainingLog, events: "SummaryWriter | None") -> None:
        """Log the steps since the last line."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        line = log.write(self.step, rates, self._measured)
        if events is not None:
            events.add_scalar("training/loss", sum(line["loss"].values()), self.step)
            for name, value in zip(("highest", "lowest"), line["rates"], strict=True):
                events.add_scalar(f"learning rate/{name}", value, self.step)

    def _is_logged(self, step: int) -> bool:
        return step % _LOG_EVERY == 0 or step == self.config.steps

    @property
    def _name(self) -> str:
        return self.config.name if isinstance(self.config, Phase) else self.folder.name

    @property
    def _validation_size(self) -> int:
        return self.config.validation_size if isinstance(self.config, Phase) else self.config.size

    def _averaged(self) -> IMCNet:
        return cast("IMCNet", self.average.module)

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        require_same(path, state.get("config"), _plain(self.config))
        # A checkpoint from before an option was added is one without it.
        found = {**asdict(IMCNetConfig()), **state.get("network_config", {})}
        require_same(path, found, asdict(self.network.config))
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self._losses = state["step"], state["history"], state["losses"]


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a training of so many steps has ended in ``folder``: it writes its history last."""
    history = read_history(folder)
    return bool(history) and history[-1]["step"] == steps


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Validations of the training in ``folder``, in their order; empty before the first checkpoint."""
    path = folder / HISTORY_NAME
    history: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return history


def require_precision(precision: Precision, device: torch.device) -> None:
    """Refuse arithmetic that the device would have to emulate, many times as slowly.

    Raises:
        TrainingError: The CPU has no instructions for it.
    """
    if device.type != "cpu" or precision == "float32":
        return
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if precision == "float16" or not native:
        raise TrainingError(f"this CPU has no {precision} arithmetic: take float32")


def _steps(config: TrainConfig | Phase, data: TrainingData) -> Steps:
    if isinstance(config, Phase):
        return MixedSteps(config, data.videos, data.images)
    require_equal_shares(config.batch_size)
    return JointSteps(config, data.videos, data.images)


class _Average:
    """Averages weights over steps, the first ones over fewer."""

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def __call__(self, averages: Sequence[Tensor], values: Sequence[Tensor], steps: Tensor | int) -> None:
        """Move ``averages`` towards ``values`` after ``steps`` steps, in place."""
        decay = min(self._decay, (1 + int(steps)) / (10 + int(steps)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)


def _plain(config: TrainConfig | Phase) -> dict[str, Any]:
    """The configuration as a checkpoint gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain
