"""What `imcnet doctor` is made of: a check looks at one thing of a patient and comes back with a finding."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from redis import Redis

from service.broker import connect
from service.cli.settings import read_settings
from service.queue import JobQueue
from service.settings import ServiceSettings
from service.storage import JobStorage
from worker.settings import WorkerSettings

Level = Literal["ok", "warn", "FAIL", "skip"]


@dataclass(frozen=True)
class Finding:
    """``skip``: not looked at, for a reason that is no fault. ``advice`` is empty where none is needed."""

    level: Level
    message: str
    advice: str = ""


def ok(message: str) -> Finding:
    return Finding("ok", message)


def skip(message: str) -> Finding:
    return Finding("skip", message)


def warn(message: str, advice: str) -> Finding:
    return Finding("warn", message, advice)


def fail(message: str, advice: str) -> Finding:
    return Finding("FAIL", message, advice)


class Patient:
    """The service of these settings, each part of it made when it is first asked for. Nothing is changed."""

    @cached_property
    def settings(self) -> ServiceSettings:
        return read_settings(ServiceSettings)

    @cached_property
    def worker_settings(self) -> WorkerSettings:
        return read_settings(WorkerSettings)

    @cached_property
    def storage(self) -> JobStorage:
        return JobStorage(self.settings.data_dir)

    @cached_property
    def redis(self) -> Redis:
        return connect(self.settings.require_redis_url(), timeout_seconds=self.settings.redis_timeout_seconds)

    @cached_property
    def redis_info(self) -> dict[str, Any]:
        """What Redis says of itself."""
        info: dict[str, Any] = self.redis.info()
        return info

    @cached_property
    def queue(self) -> JobQueue:
        return JobQueue(self.redis, lease_seconds=self.settings.lease_seconds)


@dataclass(frozen=True, kw_only=True)
class Check:
    """``needs``: checks that must not have failed, or there is nothing to look at."""

    name: str
    look: Callable[[Patient], Finding]
    needs: tuple[str, ...] = ()


def examine(patient: Patient, checks: Sequence[Check]) -> Iterator[tuple[Check, Finding]]:
    """Make the checks one after the other. One that raises has failed."""
    without = set()
    for check in checks:
        missing = [name for name in check.needs if name in without]
        finding = skip(f"needs: {', '.join(missing)}") if missing else _look(check, patient)
        if missing or finding.level == "FAIL":
            without.add(check.name)
        yield check, finding


def _look(check: Check, patient: Patient) -> Finding:
    try:
        return check.look(patient)
    except Exception as error:  # whatever it is, the other checks are made
        return fail(f"{type(error).__name__}: {' '.join(str(error).split())}", "See RUNBOOK.md.")
