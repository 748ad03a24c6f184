import os

import psutil

from tests.chaos.footprint import Footprints, Sample, _judge

MIB = 2**20


def samples(*, bytes_a_second: int = 0, descriptors_a_second: float = 0, seconds: int = 120) -> list[Sample]:
    return [
        Sample(
            seconds=float(second),
            resident_bytes=100 * MIB + second * bytes_a_second,
            descriptors=20 + int(second * descriptors_a_second),
        )
        for second in range(seconds)
    ]


def test_what_stays_as_it_is_has_not_grown() -> None:
    life = _judge("API", samples())
    assert life is not None
    assert not life.has_grown
    assert "100 → 100 MiB" in str(life)


def test_a_leak_of_memory_is_found() -> None:
    life = _judge("API", samples(bytes_a_second=MIB // 2))
    assert life is not None
    assert life.has_grown


def test_a_leak_of_descriptors_is_found() -> None:
    life = _judge("API", samples(descriptors_a_second=0.5))
    assert life is not None
    assert life.has_grown


def test_growth_at_the_start_is_no_leak() -> None:
    young = samples(bytes_a_second=10 * MIB, seconds=20)
    settled = [
        Sample(seconds=float(second), resident_bytes=300 * MIB, descriptors=20) for second in range(20, 100)
    ]
    life = _judge("API", [*young, *settled])
    assert life is not None
    assert not life.has_grown


def test_a_short_life_is_not_judged() -> None:
    assert _judge("API", samples(seconds=30)) is None


def test_real_processes_are_sampled_and_dead_ones_are_not() -> None:
    footprints = Footprints()
    for second in range(100):
        footprints.sample("me", psutil.Process(os.getpid()), at_seconds=float(second))
        footprints.sample("nobody", None, at_seconds=float(second))
    (life,) = footprints.lives()
    assert life.name == "me"
    assert life.resident_bytes[0] > MIB
