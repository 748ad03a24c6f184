"""Memory and descriptors of processes over their lives: does anything grow for as long as it lives?"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psutil

_SETTLING_SECONDS = 20.0  # a process that has just begun still imports, and fills its caches
_WORTH_JUDGING_SECONDS = 40.0
_GROWN_BYTES, _GROWN_FRACTION, _GROWN_DESCRIPTORS = 16 * 2**20, 0.1, 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Of a process, so many seconds after the first one."""

    seconds: float
    resident_bytes: int
    descriptors: int


@dataclass(frozen=True, kw_only=True)
class Life:
    """A process that was watched for long enough: what it held in the first and in the last third."""

    name: str
    seconds: float
    resident_bytes: tuple[int, int]
    descriptors: tuple[int, int]

    @property
    def has_grown(self) -> bool:
        (before, after), (opened_before, opened_after) = self.resident_bytes, self.descriptors
        return (
            after - before > max(_GROWN_BYTES, _GROWN_FRACTION * before)
            or opened_after - opened_before > _GROWN_DESCRIPTORS
        )

    def __str__(self) -> str:
        (before, after), (opened_before, opened_after) = self.resident_bytes, self.descriptors
        return (
            f"{self.name:<8} {self.seconds:>5.0f} s  {before / 2**20:>6.0f} → {after / 2**20:.0f} MiB,  "
            f"{opened_before} → {opened_after} descriptors"
        )


class Footprints:
    """Samples of named processes, taken now and then; one that has been replaced counts as another."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)

    def sample(self, name: str, process: psutil.Process | None, *, at_seconds: float) -> None:
        """Look at a process, if there is one."""
        try:
            if process is not None:
                sample = Sample(
                    seconds=at_seconds,
                    resident_bytes=process.memory_info().rss,
                    descriptors=process.num_fds(),
                )
                self._samples[name, process.pid].append(sample)
        except psutil.NoSuchProcess:
            return

    def lives(self) -> list[Life]:
        return [life for (name, _), samples in self._samples.items() if (life := _judge(name, samples))]


def _judge(name: str, samples: Sequence[Sample]) -> Life | None:
    settled = [sample for sample in samples if sample.seconds - samples[0].seconds >= _SETTLING_SECONDS]
    if not settled or settled[-1].seconds - settled[0].seconds < _WORTH_JUDGING_SECONDS:
        return None
    third = max(1, len(settled) // 3)
    first, last = settled[:third], settled[-third:]
    return Life(
        name=name,
        seconds=samples[-1].seconds - samples[0].seconds,
        resident_bytes=(_median_of(first, "resident_bytes"), _median_of(last, "resident_bytes")),
        descriptors=(_median_of(first, "descriptors"), _median_of(last, "descriptors")),
    )


def _median_of(samples: Sequence[Sample], field: str) -> int:
    return int(median(getattr(sample, field) for sample in samples))
