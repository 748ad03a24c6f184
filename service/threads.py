"""Thread defaults of PyTorch's OpenMP runtime, for machines that have other work too. Never imports torch.

PyTorch ships GNU's libgomp. Its threads wait for each other in busy loops, some hundred times a frame: where
another process takes a core away, the others burn theirs until it is back. Passive waiting sleeps instead.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

_ROOT = Path("/")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def set_thread_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's threads sleep while they wait, and be as many as the cores that this process may use.

    libgomp reads its environment when it is loaded, so this counts only before torch is imported, and for
    child processes. What ``environment`` holds already stays.
    """
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def usable_cores(root: Path = _ROOT) -> int:
    """Count the cores that affinity and the quotas of control groups leave to this process, at least 1.

    libgomp itself counts by affinity alone: in a container limited to two cores of 64, it starts 64 threads.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """Limits in cores, of this process's control group and all above it (cgroups(7))."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = mount / "cpu" if controllers else mount
        # In a namespace of its own, a container sees its group at the mount itself, whatever its path says.
        group = mount / path.lstrip("/")
        folders = [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]
        quotas += [quota for folder in folders if (quota := _quota(folder)) is not None]
    return quotas


def _quota(folder: Path) -> float | None:
    """A control group's limit in cores, by version 2 or 1; None if it has none."""
    for read in (_read_version_2, _read_version_1):
        try:
            quota, period = read(folder)
        except OSError:
            continue
        return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


def _read_version_2(folder: Path) -> tuple[str, str]:
    quota, period = (folder / "cpu.max").read_text().split()
    return quota, period


def _read_version_1(folder: Path) -> tuple[str, str]:
    return (
        (folder / "cpu.cfs_quota_us").read_text().strip(),
        (folder / "cpu.cfs_period_us").read_text().strip(),
    )
