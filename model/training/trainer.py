"""A training run, from its first step to weights; it may be interrupted anywhere and goes on exactly."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.errors import TrainingError
from model.imcnet import IMCNet, IMCNetConfig, Prediction
from model.preprocess import normalise
from model.training.checkpoint import load_checkpoint, replacing, require_same, save_checkpoint
from model.training.learning_rates import parameter_groups, scale_rates
from model.training.losses import total_loss
from model.training.presets import Precision, TrainConfig, rate_factor
from model.training.processes import count, rank, require_equal_shares
from model.training.samples import SampleBatch, SampleSource, TrainingSamples, load_batches
from model.training.sampling import JointSampler, Kind
from model.training.validation import examples, mean_similarity
from model.weights import WeightsInfo, save_weights

if TYPE_CHECKING:  # TensorBoard need not be installed
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT_NAME = "checkpoint.pt"
WEIGHTS_NAME = "weights.safetensors"
HISTORY_NAME = "history.json"
_REPORT_EVERY = 20  # steps, to TensorBoard
_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from, and the windows it is validated on."""

    videos: SampleSource
    images: SampleSource
    validation: SampleSource


class Training:
    """Trains a network in place; the state is a checkpoint in ``folder``, from which the next run goes on.

    Under ``torchrun``, every process trains its share of each batch on its own device; the first one
    writes the files, and the losses that it tells are those of its share.

    Args:
        network: Starts from the weights that it has, unless the folder holds a checkpoint.
        info: What the weights file will say of itself.
        workers: Processes that make samples; 0 makes them in this one.

    Raises:
        CheckpointError: The folder holds the checkpoint of another configuration or network.
        TrainingError: A batch cannot be shared equally among the processes.
    """

    def __init__(
        self,
        network: IMCNet,
        config: TrainConfig,
        data: TrainingData,
        *,
        info: WeightsInfo,
        folder: Path,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        require_equal_shares(config.batch_size)
        self.config, self.data, self.info = config, data, info
        self.folder, self.device, self.workers = folder, device, workers
        self.network = network.to(device).to(memory_format=torch.channels_last)
        decay = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
        self.optimizer = torch.optim.Adam(parameter_groups(network, config.rates), betas=config.betas)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._losses: list[float] = []  # since the last validation
        folder.mkdir(parents=True, exist_ok=True)
        if (path := folder / CHECKPOINT_NAME).exists():
            self._restore(load_checkpoint(path), path)
        self._forward: nn.Module = _Forward(network)
        if count() > 1:
            # Stills leave the affinity and the motion compensation without gradients.
            self._forward = DistributedDataParallel(self._forward, find_unused_parameters=bool(config.images))

    def run(self, *, stop: int | None = None, events: "SummaryWriter | None" = None) -> None:
        """Train up to step ``stop``, by default to the end, and write the averaged weights.

        Args:
            events: Is told losses, learning rates, validations and some masks.

        Raises:
            TrainingError: Masks or gradients are no longer finite, or the data cannot fill the batches.
            DatasetError: A picture cannot be read.
        """
        stop = self.config.steps if stop is None else min(stop, self.config.steps)
        disable = None if rank() == 0 else True  # None: where there is no terminal
        with tqdm(total=self.config.steps, initial=self.step, unit="step", disable=disable) as progress:
            for batch in self._batches(range(self.step, stop)):
                self._losses.append(self._train_step(batch))
                progress.set_postfix(loss=f"{self._losses[-1]:.3f}", refresh=False)
                progress.update()
                if events is not None and self.step % _REPORT_EVERY == 0:
                    self._report(events)
                if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                    self._record(events)
                if self.step % self.config.save_every == 0 or self.step == stop:
                    self.save()

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

    def validate(self) -> float:
        """Mean J of the averaged weights on validation windows, at the size trained with."""
        with self._autocast():
            return mean_similarity(self._averaged(), self.data.validation, self.config.size)

    def _train_step(self, batch: SampleBatch) -> float:
        scale_rates(self.optimizer, rate_factor(self.config.schedule, self.step, self.config.steps))
        self.network.train()
        frames = batch.frames.to(self.device, non_blocking=True)
        frames = normalise(frames, self.network.config.normalisation)
        with self._autocast():
            prediction: Prediction = self._forward(batch.kind, frames)
        # Before the loss: cross-entropy takes NaN for a fault of ours, and on CUDA its assertion is final.
        self._require_finite("masks", *prediction)
        loss = total_loss(prediction, batch.masks.to(self.device, non_blocking=True))
        # Stills leave no gradient on what they pass by; zeros instead of None would let Adam's momentum
        # go on moving those parts.
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        if not self.scaler.is_enabled():  # it leaves out such steps, of which float16 has some
            self._require_finite("gradients", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update_parameters(self.network)
        self.step += 1
        return float(loss.detach())

    def _require_finite(self, what: str, *values: Tensor) -> None:
        if not all(value.isfinite().all() for value in values):
            raise TrainingError(f"the {what} are no longer finite at step {self.step}")

    def _batches(self, steps: range) -> DataLoader[SampleBatch]:
        config = self.config
        try:
            sampler = JointSampler(
                videos=len(self.data.videos),
                images=len(self.data.images),
                batch_size=config.batch_size,
                image_batches=config.image_batches,
                seed=config.seed,
            )
        except ValueError as error:
            raise TrainingError(f"these data cannot be trained on: {error}") from error
        samples = TrainingSamples(self.data.videos, self.data.images, config.size)
        share = rank(), count()
        return load_batches(samples, sampler, steps, workers=self.workers, share=share)

    def _record(self, events: "SummaryWriter | None") -> None:
        losses, self._losses = self._losses, []
        if rank() != 0:
            return
        entry = {"step": float(self.step), "loss": float(np.mean(losses)), "j": self.validate()}
        logger.info("step %d: loss %.4f, J %.4f", self.step, entry["loss"], entry["j"])
        self.history.append(entry)
        if events is not None:
            with self._autocast():
                masks = examples(self._averaged(), self.data.validation, self.config.size)
            events.add_scalar("validation/J", entry["j"], self.step)
            events.add_images("validation/masks", masks, self.step)

    def _report(self, events: "SummaryWriter") -> None:
        events.add_scalar("training/loss", float(np.mean(self._losses[-_REPORT_EVERY:])), self.step)
        factor = rate_factor(self.config.schedule, self.step - 1, self.config.steps)
        for name, rate in asdict(self.config.rates).items():
            events.add_scalar(f"learning rate/{name}", rate * factor, self.step)

    def _averaged(self) -> IMCNet:
        return cast("IMCNet", self.average.module)

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        require_same(path, state.get("config"), _plain(self.config))
        # A checkpoint from before an option lacks it: it was off.
        found = {**asdict(IMCNetConfig()), **state.get("network_config", {})}
        require_same(path, found, asdict(self.network.config))
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self._losses = state.get("losses", [])  # the first checkpoints did not hold them


class _Forward(nn.Module):
    """Both ways through the network as one ``forward``, which is all that DistributedDataParallel sees."""

    def __init__(self, network: IMCNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, kind: Kind, frames: Tensor) -> Prediction:
        """Args: normalised ``(B, T, 3, H, W)``, with T = 1 for stills."""
        prediction: Prediction = (
            self.network(frames) if kind == "video" else self.network.segment_image(frames[:, 0])
        )
        return prediction


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a checkpoint gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain
