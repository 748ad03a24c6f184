"""Learning rates by module: what is pretrained trains more slowly than what is new, or not at all."""

import re
from collections.abc import Collection
from typing import Any

from torch.optim import Optimizer

from model.errors import TrainingError
from model.imcnet import IMCNet
from model.training.presets import ModuleRates

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")


def parameter_groups(
    network: IMCNet, rates: ModuleRates, trained: Collection[str] = ()
) -> list[dict[str, Any]]:
    """All parameters that train, in groups by learning rate, for an optimizer.

    Args:
        trained: Prefixes of the names of those that may train; empty for all.

    Raises:
        TrainingError: No parameter has one of the prefixes, or nothing trains at all.
    """
    names = [name for name, _ in network.named_parameters()]
    for prefix in trained:
        if not any(name.startswith(prefix) for name in names):
            raise TrainingError(f"the network has no parameter {prefix}* to train")
    last_block = max((int(match[1]) for name in names if (match := _BLOCK.match(name))), default=-1)
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        rate = rates.of(name, last_block=last_block)
        if rate and (not trained or name.startswith(tuple(trained))):
            group = groups.setdefault(rate, {"params": [], "lr": rate, "peak_lr": rate})
            group["params"].append(parameter)
    if not groups:
        raise TrainingError("no parameter of the network has a learning rate")
    return list(groups.values())


def freeze_all_but(network: IMCNet, groups: list[dict[str, Any]]) -> None:
    """Compute gradients for the parameters in ``groups`` alone.

    Whatever comes before the first of them runs without a graph, so that it costs no backward pass.
    """
    network.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)


def scale_rates(optimizer: Optimizer, factor: float) -> None:
    """Set every learning rate to a share of its group's own."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
