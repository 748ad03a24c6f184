"""One of the processes that ``test_processes`` starts: trains two steps and leaves its weights."""

import sys
from pathlib import Path

import torch

from model.imcnet import IMCNetConfig
from model.training.presets import Rates, TrainConfig
from model.training.processes import joined, rank
from model.training.trainer import Training, TrainingData
from model.variants import build_network
from model.weights import WeightsInfo
from tests.training_data import RenderedWindows

CONFIG = TrainConfig(
    steps=2,
    size=64,
    batch_size=4,
    rates=Rates(1e-3, 1e-3, 1e-3),
    videos=(("davis16", 1),),
    images=(("duts", 1),),
    image_batches=1,
    precision="float32",
    save_every=1,
)


def training_data() -> TrainingData:
    windows, stills = RenderedWindows([0, 1, 2, 3]), RenderedWindows([4, 5, 6, 7], num_frames=1)
    return TrainingData(windows, stills, validation=RenderedWindows([8]))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as device:
        torch.manual_seed(rank())  # the weights of the first process must become those of all
        network = build_network(IMCNetConfig("resnet18"))
        if rank() == 0:
            torch.save(network.state_dict(), folder / "start.pt")
        info = WeightsInfo("together", network.config, True, "a test", "CC0-1.0")
        run = Training(network, CONFIG, training_data(), info=info, folder=folder, device=device)
        for step in (1, 2):
            run.run(stop=step)
            parameters = dict(network.named_parameters())
            averages = {f"average.{name}": value for name, value in run.average.module.named_parameters()}
            torch.save(parameters | averages, folder / f"rank{rank()}-step{step}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
