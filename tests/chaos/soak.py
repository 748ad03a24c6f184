"""Many short jobs while everything is killed at random.

``python -m tests.chaos.soak --jobs 1000 --seed 1``
"""

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from model.imcnet import IMCNetConfig
from model.weights import init_weights
from tests.chaos.client import TERMINAL, Client
from tests.chaos.faults import engine, family, horse, kill
from tests.chaos.footprint import Footprints, Life
from tests.chaos.rig import Rig, new_rig
from tests.videos import moving_square, write_video

LENGTHS = (3, 5, 8, 12, 20)
SETTINGS = {"max_attempts": 20, "max_queued_jobs": 40, "span_frames": 4}
"""With so many attempts no number of kills excuses a job that fails."""

_IN_FLIGHT = 12
_CANCELED, _DELETED = 0.05, 0.5  # shares of the jobs
_FAULT_SECONDS = 2.5  # between one and the next, on average
_TICK_SECONDS = 0.25
_STUCK_SECONDS = 120.0
_NEWS_SECONDS = 10.0

# How often which fault comes. The first worker is spared, so that one lives long enough to be looked at.
_FAULTS = {"horse": 8, "engine": 6, "worker": 5, "worker, engine and horse": 4, "API": 2, "Redis": 1}


@dataclass
class Report:
    """What a soak came to."""

    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    lives: list[Life] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [
            f"{sum(self.ends.values())} jobs in {self.seconds:.0f} s: {_counts(self.ends)}",
            f"kills: {_counts(self.faults)}",
            f"jobs by attempts: {_counts(self.attempts)}",
            *(f"{life}" for life in self.lives),
        ]


def soak(
    rig: Rig, clips: Sequence[Path], *, jobs: int, chance: random.Random, say: Callable[[str], None]
) -> Report:
    """Send so many jobs through a rig, whose API and two workers run, and kill at random meanwhile.

    Raises:
        AssertionError: An invariant does not hold, a job has failed, or a process has grown.
    """
    for clip in clips:
        rig.learn(clip)
    report, began_at = Report(), time.monotonic()
    with rig.trial() as client, ThreadPoolExecutor(1) as threads:
        saboteur = _Saboteur(rig, random.Random(chance.random()), report)
        customer = _Customer(client, clips, jobs, random.Random(chance.random()), report)

        def serve() -> None:
            news_at = began_at
            while not customer.is_served:
                customer.serve()
                if time.monotonic() >= news_at:
                    say(f"{time.monotonic() - began_at:5.0f} s  {customer}, kills: {_counts(report.faults)}")
                    news_at += _NEWS_SECONDS

        served = threads.submit(serve)
        # Here and not in a thread: what a thread has started dies with it.
        saboteur.strike_until(served.done)
        served.result()
        customer.clear_up()
    report.seconds = time.monotonic() - began_at
    report.lives = saboteur.footprints.lives()
    failed = report.ends.keys() - {"succeeded", "canceled"}
    assert not failed, "\n".join(report.lines())
    assert not [life for life in report.lives if life.has_grown], "\n".join(report.lines())
    return report


class _Customer:
    """Keeps a number of jobs in flight, cancels some, takes away what is done, and deletes some of it."""

    def __init__(
        self, client: Client, clips: Sequence[Path], jobs: int, chance: random.Random, report: Report
    ) -> None:
        self._client = client
        self._clips = clips
        self._jobs = jobs
        self._chance = chance
        self._report = report
        self._posted = 0
        self._moved_at = time.monotonic()
        self._in_flight: set[str] = set()

    def __str__(self) -> str:
        return f"{self._posted} of {self._jobs} jobs posted, {len(self._in_flight)} in flight"

    @property
    def is_served(self) -> bool:
        return self._posted >= self._jobs and not self._in_flight

    def serve(self) -> None:
        """One round: post if there is room, then look at every job in flight."""
        if self._posted < self._jobs and len(self._in_flight) < _IN_FLIGHT:
            job_id = self._client.post(self._chance.choice(self._clips))
            if job_id is not None:
                self._posted += 1
                self._in_flight.add(job_id)
        for job_id in sorted(self._in_flight):
            if self._chance.random() < _CANCELED / 20:  # of about twenty looks at a job
                self._client.cancel(job_id)
            job = self._client.job(job_id)
            if job is not None and job["status"] in TERMINAL:
                self._take(job)
        stuck_seconds = time.monotonic() - self._moved_at
        assert stuck_seconds < _STUCK_SECONDS, (
            f"no job has ended for {stuck_seconds:.0f} s: {self._in_flight}"
        )

    def clear_up(self) -> None:
        """See to their end, and delete, those jobs too whose 202 was lost on its way."""
        acknowledged = self._client.acknowledged
        for job_id in self._listed():
            if job_id not in acknowledged:
                self._client.ended(job_id)
                self._client.delete(job_id)

    def _take(self, job: dict[str, Any]) -> None:
        self._in_flight.remove(job["id"])
        self._moved_at = time.monotonic()
        self._report.ends[job["status"]] += 1
        self._report.attempts[job["attempt"]] += 1
        if job["status"] == "succeeded":
            self._client.download(job["id"])
        if self._chance.random() < _DELETED:
            self._client.delete(job["id"])

    def _listed(self) -> list[str]:
        listed: list[str] = []
        after: dict[str, str] = {}
        while True:
            answer = self._client.call("GET", "/jobs", params={"limit": "100", **after})
            assert answer is not None, "the API does not answer"
            page = answer.json()
            listed += [job["id"] for job in page["items"]]
            if page["next_cursor"] is None:
                return listed
            after = {"cursor": page["next_cursor"]}


class _Saboteur:
    """Kills, starts again what is dead, and looks at what lives."""

    def __init__(self, rig: Rig, chance: random.Random, report: Report) -> None:
        self._rig = rig
        self._chance = chance
        self._report = report
        self._spared = rig.living_workers[0]
        self.footprints = Footprints()

    def strike_until(self, is_over: Callable[[], bool]) -> None:
        """Returns with everything in order."""
        due_at = time.monotonic() + self._pause_seconds()
        while not is_over():
            self._look()
            self._rig.relaunch_dead_workers()
            if time.monotonic() >= due_at:
                self._strike(self._chance.choices([*_FAULTS], [*_FAULTS.values()])[0])
                due_at = time.monotonic() + self._pause_seconds()
            time.sleep(_TICK_SECONDS)
        self._rig.replace_the_dead()

    def _pause_seconds(self) -> float:
        return self._chance.uniform(0, 2 * _FAULT_SECONDS)

    def _strike(self, fault: str) -> None:
        struck = True
        worker = self._chance.choice(self._rig.living_workers)
        match fault:
            case "horse":
                struck = kill(horse(worker))
            case "engine":
                struck = kill(engine(worker))
            case "API" | "Redis":
                with self._rig.history.during(f"{fault} killed"):
                    (self._rig.api if fault == "API" else self._rig.server.process).kill()
                    time.sleep(self._chance.uniform(0, 1))
                    self._rig.restart_front()
            case _ if worker is self._spared:
                struck = False
            case "worker":
                struck = kill(psutil.Process(worker.pid))
            case _:
                struck = kill(*family(worker))
        self._report.faults[fault] += struck

    def _look(self) -> None:
        now = time.monotonic()
        self.footprints.sample("API", psutil.Process(self._rig.api.pid), at_seconds=now)
        self.footprints.sample("Redis", psutil.Process(self._rig.server.process.pid), at_seconds=now)
        for worker in self._rig.living_workers:
            self.footprints.sample("worker", family(worker)[0], at_seconds=now)
            self.footprints.sample("engine", engine(worker), at_seconds=now)


def main(
    jobs: Annotated[int, typer.Option(help="How many jobs.")] = 1000,
    seed: Annotated[int, typer.Option(help="Decides which jobs, which faults and when.")] = 1,
) -> None:
    """Soak a service of its own, with two workers on the CPU, in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="imcnet-soak-") as name:
        directory = Path(name)
        weights = directory / "untrained.safetensors"
        init_weights(weights, IMCNetConfig(backbone="resnet18"), seed=0)
        rig = new_rig(directory, weights, **SETTINGS)
        try:
            rig.start_api()
            rig.start_workers(2)
            report = soak(rig, clips(directory), jobs=jobs, chance=random.Random(seed), say=typer.echo)
        finally:
            rig.stop()
    typer.echo("\n".join(report.lines()))


def clips(directory: Path) -> list[Path]:
    return [write_video(directory / f"{count}.mp4", moving_square(count)) for count in LENGTHS]


def _counts(counter: Counter[Any]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counter.items())) or "none"


if __name__ == "__main__":
    typer.run(main)
