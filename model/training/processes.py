"""Several processes that train one network together, as ``torchrun`` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from model.errors import TrainingError


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes, if ``torchrun`` started this one.

    Yields:
        The device of this process: on CUDA, the one of its rank on this machine.
    """
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Number of this process; 0 writes the files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def require_equal_shares(batch_size: int) -> None:
    """Raises: TrainingError: The processes cannot share a batch equally."""
    if batch_size % count():
        raise TrainingError(f"{count()} processes cannot share batches of {batch_size} equally")
