"""What `imcnet doctor` looks at on the disk: what the file system can do, and what lies there."""

import fcntl
import os
import statistics
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from service.cli.examination import Check, Finding, Patient, fail, ok, warn
from service.errors import JobGone, JobNotFound
from service.jobs import utc_now
from service.settings import GIB, ServiceSettings
from service.storage import JobStorage

_PARTS = ("uploads", "jobs", "tombstones", "trash")
_SYNCS = 5
_SLOW_SYNC_MS = 100
_STALE_SECONDS = 3600  # the sweep is overdue by far
_SCARCE_FRACTION = 0.05  # of the inodes


def data_directory(patient: Patient) -> Finding:
    root = patient.settings.data_dir
    if not root.is_dir():
        return fail(f"There is no directory {root}", "Set IMCNET_DATA_DIR, mount it, or start the API once.")
    if missing := [name for name in (*_PARTS, "identity") if not (root / name).exists()]:
        return fail(
            f"{root} has no {', '.join(missing)}",
            "It is another directory than the API's (set IMCNET_DATA_DIR, mount it), or no API has run yet.",
        )
    if len({(root / name).stat().st_dev for name in _PARTS}) > 1:
        return fail(
            f"{root} lies on several file systems", "Mount one: files are moved between its directories."
        )
    return ok(str(root))


def writing(patient: Patient) -> Finding:
    durations_ms = []
    for _ in range(_SYNCS):
        began = time.perf_counter()
        patient.storage.check_writable()
        durations_ms.append(1000 * (time.perf_counter() - began))
    message = f"A file is made and synced in {(median_ms := statistics.median(durations_ms)):.1f} ms"
    if median_ms > _SLOW_SYNC_MS:
        return warn(message, "Who else writes to this disk? Every upload and span waits for it.")
    return ok(message)


def file_system(patient: Patient) -> Finding:
    """What everything rests on: exactly one of several wins, whoever is fast."""
    properties = {
        "link(2) is exclusive": _link_is_exclusive,
        "a directory that is not empty is never replaced": _full_directory_stays,
        "flock(2) excludes": _lock_excludes,
    }
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=patient.settings.data_dir / "trash") as probe:
        wanting = [name for name, holds in properties.items() if not holds(Path(probe))]
    if wanting:
        return fail(
            f"Not so here: {'; '.join(wanting)}", "Move the data directory to a local file system or NFSv4."
        )
    return ok("Links, renames and locks are exclusive")


def disk_space(patient: Patient) -> Finding:
    free, reserve = patient.storage.free_bytes(), patient.settings.disk_reserve_bytes
    message = f"{free / GIB:.1f} GiB are free, {reserve / GIB:.1f} GiB are to stay so"
    if free < reserve:
        return fail(
            message, "Uploads are refused (507): free some, `imcnet jobs delete`, or lower the retention."
        )
    if free < 2 * reserve:
        return warn(message, "Soon uploads will be refused: free some, or lower the retention.")
    return ok(message)


def inodes(patient: Patient) -> Finding:
    disk = os.statvfs(patient.settings.data_dir)
    if not disk.f_files:
        return ok("This file system does not run out of them")
    message = f"{disk.f_favail:,} of {disk.f_files:,} are free"
    if not disk.f_favail:
        return fail(message, "No file can be made: `imcnet jobs delete`, or remove other small files.")
    if disk.f_favail < _SCARCE_FRACTION * disk.f_files:
        return warn(message, "Who has so many small files on this disk?")
    return ok(message)


def leftovers(patient: Patient) -> Finding:
    """What the sweep should have removed long ago."""
    storage, root = patient.storage, patient.settings.data_dir
    counts = {
        f"in {name}/": sum(_is_stale(entry) for entry in (root / name).iterdir())
        for name in ("uploads", "trash")
    }
    counts["of jobs that have ended"] = sum(_has_leftovers(storage, job_id) for job_id in storage.job_ids())
    counts["expired jobs"] = sum(
        _is_expired(storage, job_id, patient.settings) for job_id in storage.job_ids()
    )
    if not any(counts.values()):
        return ok("Nothing lies about")
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return warn(
        f"Left over for more than an hour: {found}",
        "The API sweeps every IMCNET_SWEEP_INTERVAL_SECONDS: is one running? Does its log complain?",
    )


def records(patient: Patient) -> Finding:
    job_ids = list(patient.storage.job_ids())
    damaged = [job_id for job_id in job_ids if not _is_readable(patient.storage, job_id)]
    if damaged:
        return fail(
            f"The files of {len(damaged)} of {len(job_ids)} jobs are damaged: {named(damaged)}",
            "Restore them from a backup, or `imcnet jobs delete` them. Is the disk failing (dmesg)?",
        )
    return ok(f"Those of {len(job_ids)} jobs are sound")


def named(job_ids: list[str], *, most: int = 3) -> str:
    """The jobs by their ids, if they are few."""
    return ", ".join(job_ids[:most]) + (", …" if len(job_ids) > most else "")


def _link_is_exclusive(probe: Path) -> bool:
    (probe / "draft").touch()
    try:
        os.link(probe / "draft", probe / "outcome")
    except OSError:  # there are no hard links here
        return False
    try:
        os.link(probe / "draft", probe / "outcome")
    except FileExistsError:
        return True
    return False


def _full_directory_stays(probe: Path) -> bool:
    (probe / "new").mkdir()
    (probe / "old" / "inside").mkdir(parents=True)
    try:
        (probe / "new").rename(probe / "old")
    except OSError:
        return True
    return False


def _lock_excludes(probe: Path) -> bool:
    with open(probe / "lock", "w") as first, open(probe / "lock", "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # there are no locks here
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _is_stale(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    return False


def _has_leftovers(storage: JobStorage, job_id: str) -> bool:
    directory = storage.source(job_id).parent
    if not _is_stale(directory / "outcome.json"):
        return False
    return (
        any(directory.glob("attempt-*")) or any(directory.glob("ended-*")) or any(directory.glob("spans-*"))
    )


def _is_expired(storage: JobStorage, job_id: str, settings: ServiceSettings) -> bool:
    with suppress(ValueError):
        outcome = storage.outcome(job_id)
        kept = timedelta(seconds=settings.retention_seconds + _STALE_SECONDS)
        return outcome is not None and utc_now() - outcome.finished_at > kept
    return False


def _is_readable(storage: JobStorage, job_id: str) -> bool:
    try:
        storage.load(job_id)
        storage.attempts(job_id)
        storage.outcome(job_id)
    except JobGone:
        return True  # removed meanwhile
    except (JobNotFound, ValueError):
        return False
    return True


_DIRECTORY = ("data directory",)

CHECKS = (
    Check(name="data directory", look=data_directory, needs=("settings",)),
    Check(name="writing", look=writing, needs=_DIRECTORY),
    Check(name="file system", look=file_system, needs=_DIRECTORY),
    Check(name="disk space", look=disk_space, needs=_DIRECTORY),
    Check(name="inodes", look=inodes, needs=_DIRECTORY),
    Check(name="left-overs", look=leftovers, needs=_DIRECTORY),
    Check(name="records", look=records, needs=_DIRECTORY),
)
