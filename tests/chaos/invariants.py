"""What has to hold whatever dies, judged from a history of calls, the storage and Redis.

Every check returns its violations as sentences; none is none. :func:`require` turns them into a failure.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import pairwise, product
from pathlib import Path

from redis import Redis

from tests.chaos.client import TERMINAL
from tests.chaos.history import Call, History

_JOB_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def require(violations: Collection[str]) -> None:
    """Raises: AssertionError: There are violations."""
    assert not violations, "\n".join(violations)


def unfinished_jobs(history: History) -> list[str]:
    """I1: every acknowledged job reaches a terminal state, unless a client has deleted it."""
    done = {call.job_id for call in history.calls if call.job_status in TERMINAL or call.removes}
    return [
        f"I1: job {job_id} was acknowledged and never ended"
        for job_id in history.acknowledged
        if job_id not in done
    ]


def differing_downloads(history: History, references: Mapping[str, str]) -> list[str]:
    """I2, as clients see it: masks come from succeeded jobs only, and are those of an undisturbed run.

    Args:
        references: The SHA-256 of ``masks.zip`` by what was sent.
    """
    violations = []
    ends, acknowledged = _ends(history), history.acknowledged
    for call in history.calls:
        if call.received is None or not call.path.endswith("/masks.zip") or call.job_id is None:
            continue
        if (end := ends.get(call.job_id)) not in ("succeeded", None):
            violations.append(f"I2: job {call.job_id} is {end}, and its masks were downloaded")
        sent = acknowledged.get(call.job_id)
        if sent not in references:
            violations.append(f"I2: there is nothing to compare the masks of job {call.job_id} with")
        elif call.received != references[sent]:
            violations.append(f"I2: the masks of job {call.job_id} are not those of an undisturbed run")
    return violations


def wrongly_published(history: History, references: Mapping[str, str], data_dir: Path) -> list[str]:
    """I2, in the storage: one archive per succeeded job, that of an undisturbed run; none for any other."""
    violations = []
    acknowledged = history.acknowledged
    removed = {call.job_id for call in history.calls if call.removes}
    for job_id, end in _ends(history).items():
        if job_id in removed or job_id not in acknowledged:
            continue
        archives = list((data_dir / "jobs" / job_id).rglob("masks.zip"))
        if len(archives) != (end == "succeeded"):
            violations.append(f"I2: job {job_id} is {end} and has {len(archives)} archives")
        for archive in archives:
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            if digest != references.get(acknowledged[job_id]):
                violations.append(f"I2: {archive} is not that of an undisturbed run")
    return violations


def backward_moves(history: History) -> list[str]:
    """I3: a terminal state is final and a removed job stays away; else states move forward, and from
    ``running`` back to ``queued`` only if the next ``running`` is of a later attempt."""
    seen: dict[str, list[Call]] = defaultdict(list)
    for call in history.calls:
        if call.job_id is not None and (call.job_status is not None or call.removes):
            seen[call.job_id].append(call)
    return [
        f"I3: job {job_id} {violation}"
        for job_id, calls in seen.items()
        for violation in _backward_moves(sorted(calls, key=lambda call: call.began_at))
    ]


def leftovers(data_dir: Path, redis: Redis, *, kept: Collection[str] = ()) -> list[str]:
    """I4: of the jobs that are not ``kept`` nothing is left but tombstones; no upload, no rubbish, no key."""
    entries = [entry for folder in ("jobs", "uploads", "trash") for entry in (data_dir / folder).glob("*")]
    violations = [
        f"I4: {entry.relative_to(data_dir)} is left"
        for entry in entries
        if not (entry.parent.name == "jobs" and entry.name in kept)
    ]
    for key in redis.scan_iter(count=1000):
        name = key.decode(errors="replace")
        if (found := _JOB_ID.search(name)) and found[0] not in kept:
            violations.append(f"I4: {name} is left in Redis")
    return violations


def unexcused_errors(history: History) -> list[str]:
    """I5: every call outside the announced faults is answered, and not with 5xx."""
    violations = []
    for call in history.calls:
        if call.status_code is not None and call.status_code < 500:
            continue
        if not any(w.began_at <= call.ended_at and call.began_at <= w.ended_at for w in history.windows):
            answer = "no answer" if call.status_code is None else call.status_code
            violations.append(f"I5: {call.method} {call.path} got {answer} and no fault was at work")
    return violations


def _ends(history: History) -> dict[str, str]:
    return {
        call.job_id: call.job_status
        for call in history.calls
        if call.job_id is not None and call.job_status in TERMINAL
    }


def _backward_moves(calls: list[Call]) -> list[str]:
    """Of one job. Calls that overlap say nothing about the order of what they saw."""
    violations = set()
    for earlier, later in product(calls, calls):
        if earlier.ended_at > later.began_at:
            continue
        if earlier.removes and later.job_status is not None:
            violations.add(f"was removed and then {later.job_status}")
        if earlier.job_status is None or later.job_status is None:
            continue
        if earlier.job_status in TERMINAL and later.job_status != earlier.job_status:
            violations.add(f"was {earlier.job_status} and then {later.job_status}")
        if earlier.job_status == "canceling" and later.job_status not in ("canceling", "canceled"):
            violations.add(f"was canceling and then {later.job_status}")
        if (later.attempt or 0) < (earlier.attempt or 0):
            violations.add(f"was at attempt {earlier.attempt} and then at {later.attempt}")
    runs = [call for call in calls if call.job_status == "running"]
    for earlier, later in pairwise(runs):
        back_in_the_queue = any(
            call.job_status == "queued"
            and earlier.ended_at <= call.began_at
            and call.ended_at <= later.began_at
            for call in calls
        )
        if back_in_the_queue and (later.attempt or 0) <= (earlier.attempt or 0):
            violations.add(f"ran again after it was back in the queue, still as attempt {later.attempt}")
    return sorted(violations)
