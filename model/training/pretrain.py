"""Train a backbone from scratch on labelled images, where ImageNet's weights cannot be had."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.backbone import ResNetName, ResNetPyramid, save_backbone
from model.errors import DatasetError
from model.preprocess import Normalisation, normalise
from model.training.checkpoint import load_checkpoint, replacing, require_same, save_checkpoint
from model.training.labelled_images import random_views
from model.training.processes import count, rank, require_equal_shares

CHECKPOINT_NAME = "pretrain.pt"
BACKBONE_NAME = "backbone.safetensors"
NORMALISATION: Normalisation = "imagenet"


@dataclass(frozen=True)
class PretrainConfig:
    """How a backbone is trained.

    Args:
        size: Side of the images, in pixels.
        learning_rate: Peak of the schedule: a linear warm-up over the first twentieth, then a cosine to 0.
        label_smoothing: Share of the target that is spread over all classes.
        smallest_crop: A view shows at least this share of the image's area.
        save_every: Steps from one checkpoint to the next.
    """

    backbone: ResNetName = "resnet18"
    size: int = 64
    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 0.2
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    smallest_crop: float = 0.35
    save_every: int = 250
    seed: int = 0


class Classifier(nn.Module):
    """A backbone under the head that ResNet was published with: average over space, then one linear map."""

    def __init__(self, backbone: ResNetName, classes: int) -> None:
        super().__init__()
        self.backbone = ResNetPyramid(backbone)
        self.head = nn.Linear(self.backbone.channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Args: normalised RGB ``(B, 3, H, W)``. Returns class logits ``(B, classes)``."""
        logits: Tensor = self.head(self.backbone(images).v5.mean(dim=(2, 3)))
        return logits


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over a twentieth of the steps, then a cosine to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


class Pretraining:
    """A run: its state is a checkpoint in ``folder``, from which it goes on exactly where it stopped.

    Under ``torchrun``, every process trains its share of each batch on its own device, in mixed precision
    (bfloat16) on every one; the first process writes the files.

    Args:
        train: Items are ``(image uint8 (3, S, S), label)``.
        val: The same.

    Raises:
        CheckpointError: The folder holds the checkpoint of another configuration, or of other classes.
        DatasetError: There are fewer images than a batch takes, or none to validate with.
        TrainingError: A batch cannot be shared equally among the processes.
    """

    def __init__(
        self,
        config: PretrainConfig,
        train: Dataset[tuple[Tensor, int]],
        val: Dataset[tuple[Tensor, int]],
        *,
        classes: int,
        folder: Path,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        require_equal_shares(config.batch_size)
        self.config, self.classes = config, classes
        self.train, self.val = train, val
        self.folder, self.device, self.workers = folder, device, workers
        torch.manual_seed(config.seed)
        self.network = Classifier(config.backbone, classes).to(device)
        self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
        )
        self.steps_per_epoch = len(train) // config.batch_size  # type: ignore[arg-type]
        if not self.steps_per_epoch or not len(val):  # type: ignore[arg-type]
            raise DatasetError(
                f"{len(train)} images to train on and {len(val)} to validate with "  # type: ignore[arg-type]
                f"are too few for batches of {config.batch_size}"
            )
        self.steps = self.steps_per_epoch * config.epochs
        self.step = 0
        self.history: list[dict[str, float]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (path := folder / CHECKPOINT_NAME).exists():
            self._restore(load_checkpoint(path), path)
        self._forward: nn.Module = DistributedDataParallel(self.network) if count() > 1 else self.network

    def run(self) -> float:
        """Train to the end; returns the share of correct validations."""
        disable = None if rank() == 0 else True  # None: where there is no terminal
        with tqdm(total=self.steps, initial=self.step, unit="step", disable=disable) as progress:
            while self.step < self.steps:
                epoch = self.step // self.steps_per_epoch
                for images, labels in self._batches(epoch):
                    loss = self._train_step(images, labels)
                    progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    progress.update()
                    # An epoch's last step is saved with the epoch's accuracy, or never again followed by it.
                    if self.step % self.config.save_every == 0 and self.step % self.steps_per_epoch:
                        self._save()
                accuracy = self.accuracy()
                self.history.append({"step": self.step, "loss": loss, "accuracy": accuracy})
                if rank() == 0:
                    progress.write(f"epoch {epoch + 1}/{self.config.epochs}: accuracy {accuracy:.4f}")
                self._save()
        return self.history[-1]["accuracy"]

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) * 64 + rank())
        views = random_views(images.to(self.device), generator, self.config.smallest_crop)
        rate = self.config.learning_rate * learning_rate_factor(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self._forward(
                normalise(views, NORMALISATION).contiguous(memory_format=torch.channels_last)
            )
        loss = functional.cross_entropy(
            logits.float(), labels.to(self.device), label_smoothing=self.config.label_smoothing
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Share of the validation images whose class has the highest logit."""
        self.network.eval()
        correct = 0
        for images, labels in DataLoader(self.val, self.config.batch_size, num_workers=self.workers):
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = self.network(normalise(images.to(self.device), NORMALISATION))
            correct += int((logits.argmax(1).cpu() == labels).sum())
        return correct / len(self.val)  # type: ignore[arg-type]

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of an epoch: its order depends on seed and epoch alone."""
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.train))  # type: ignore[arg-type]
        first = self.step % self.steps_per_epoch
        size = self.config.batch_size
        batches = [
            order[i * size : (i + 1) * size][rank() :: count()].tolist()
            for i in range(first, self.steps_per_epoch)
        ]
        yield from DataLoader(self.train, batch_sampler=batches, num_workers=self.workers)

    def _save(self) -> None:
        if rank() != 0:
            return
        state = {
            "config": asdict(self.config),
            "classes": self.classes,
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        save_checkpoint(self.folder / CHECKPOINT_NAME, state)
        with replacing(self.folder / BACKBONE_NAME) as unfinished:
            save_backbone(unfinished, self.network.backbone, self.config.backbone)

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        found = {**state.get("config", {}), "classes": state.get("classes", self.classes)}
        require_same(path, found, {**asdict(self.config), "classes": self.classes})
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]
