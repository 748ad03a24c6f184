import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.errors import TrainingError
from model.imcnet import IMCNetConfig
from model.preprocess import normalise
from model.training import processes
from model.training.learning_rates import parameter_groups
from model.training.losses import final_loss, side_loss
from model.training.sampling import JointSampler
from model.variants import build_network
from tests.conftest import REPOSITORY
from tests.model.training.train_together import CONFIG, training_data

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left that trained together."""
    folder = tmp_path_factory.mktemp("together")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, "-m", "tests.model.training.train_together", folder],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=280,
    )
    return folder


def weights(folder: Path, rank: int, step: int) -> dict[str, Tensor]:
    read: dict[str, Tensor] = torch.load(folder / f"rank{rank}-step{step}.pt", weights_only=True)
    return read


@pytest.mark.parametrize("step", [1, 2])  # the first on windows, the second on stills
def test_two_processes_have_the_same_weights_after_each_step(step: int, folder: Path) -> None:
    first, second = weights(folder, 0, step), weights(folder, 1, step)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_their_step_is_that_of_the_mean_of_their_gradients(folder: Path) -> None:
    network = build_network(IMCNetConfig("resnet18")).train()
    network.load_state_dict(torch.load(folder / "start.pt", weights_only=True))
    data = training_data()
    keys = JointSampler(videos=4, images=4, batch_size=4, image_batches=1).batch(0).keys
    samples = [data.videos.sample(key.index, np.random.default_rng(key.seed), 64) for key in keys]
    for share in (samples[0::2], samples[1::2]):  # batch norm sees each on its own
        frames = normalise(torch.stack([sample.frames for sample in share]), "imagenet")
        target = torch.stack([sample.masks for sample in share]).float() / 255
        logits, side_masks = network(frames)
        ((final_loss(logits, target[:, 1]) + side_loss(side_masks, target)) / 2).backward()
    nn.utils.clip_grad_norm_(network.parameters(), CONFIG.clip_norm)
    torch.optim.Adam(parameter_groups(network, CONFIG.rates), betas=CONFIG.betas).step()
    found, start = weights(folder, 0, 1), torch.load(folder / "start.pt", weights_only=True)
    for name, parameter in network.named_parameters():
        # Adam's first step is the rate times the gradient's sign: where that is in doubt, either will do.
        moved, expected = found[name] - start[name], parameter.detach() - start[name]
        agreeing = ((moved - expected).abs() < 1e-4).float().mean()
        assert agreeing > 0.97 or name == "affinity.left.bias", name


def test_the_first_process_alone_writes_the_results(folder: Path) -> None:
    names = {path.name for path in folder.iterdir() if not path.name.startswith(("rank", "start"))}
    assert names == {"checkpoint.pt", "weights.safetensors", "best.safetensors", "history.json", "log.jsonl"}


def test_one_process_is_the_first_and_only() -> None:
    assert (processes.rank(), processes.count()) == (0, 1)
    with processes.joined(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
        assert processes.count() == 1


def test_a_batch_that_processes_cannot_share_equally_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("fake", rank=0, world_size=3)
    try:
        processes.require_equal_shares(6)
        with pytest.raises(TrainingError, match="3 processes cannot share batches of 8 equally"):
            processes.require_equal_shares(8)
    finally:
        torch.distributed.destroy_process_group()
