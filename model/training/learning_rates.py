"""Learning rates by module: the paper trains what is pretrained more slowly than what is new."""

from typing import Any

from torch.optim import Optimizer

from model.imcnet import IMCNet
from model.training.presets import Rates


def parameter_groups(network: IMCNet, rates: Rates) -> list[dict[str, Any]]:
    """All parameters in groups by the learning rate of their module, for an optimizer."""
    by_module = {
        "backbone": rates.backbone,
        "key_encoder": rates.backbone,
        "affinity": rates.attention,
        "propagation": rates.attention,
    }
    groups = []
    for name, module in network.named_children():
        if parameters := list(module.parameters()):
            rate = by_module.get(name, rates.motion)
            groups.append({"params": parameters, "lr": rate, "peak_lr": rate})
    return groups


def scale_rates(optimizer: Optimizer, factor: float) -> None:
    """Set every learning rate to a share of its group's own."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
