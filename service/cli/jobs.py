"""`imcnet jobs`: look at jobs and end them, straight on the data directory and Redis. For operators."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from service.broker import connect
from service.cli import job_report
from service.cli.settings import read_settings
from service.errors import JobGone, JobNotFound, Misconfigured, QueueUnavailable
from service.jobs import AttemptEnd, JobStatus
from service.queue import JobQueue
from service.settings import ServiceSettings
from service.storage import JobStorage

if TYPE_CHECKING:
    from service.services import Services

app = typer.Typer(help="List, show, cancel, delete and requeue jobs, without the API.")

_LIMIT = 50
_SHORTEST_ABBREVIATION = 4  # an empty variable of a shell script must not stand for a job

JobArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of a job, or its beginning or end.")]
JobsArgument = Annotated[list[str], typer.Argument(metavar="ID…", help="Ids, or their beginnings or ends.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def jobs(context: typer.Context) -> None:
    """List, show, cancel, delete and requeue jobs, without the API. Alone: as `imcnet jobs list`."""
    if context.invoked_subcommand is None:
        list_jobs()


@app.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = _LIMIT,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the newest first."""
    services = _services()
    queue = _queue_if_up(services)
    lines: list[job_report.JobLine] = []
    for job_id in services.storage.job_ids():
        if len(lines) == limit:
            typer.echo(f"imcnet: there may be more than these {limit}: see --limit", err=True)
            break
        try:
            line = job_report.summarize(services.storage, queue, job_id)
        except JobGone:
            continue  # removed since the directory was listed
        if status is None or line.status == status:
            lines.append(line)
    if as_json:
        typer.echo(json.dumps([job_report.line_document(line) for line in lines], indent=2))
    else:
        typer.echo(job_report.table(lines))


@app.command("show")
def show(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show all that is known of a job: record, attempts, spans, outcome, files, and what Redis holds."""
    services = _services()
    queue = _queue_if_up(services)
    job_id = _find(services.storage, job)
    settings = services.settings
    redis = connect(settings.require_redis_url(), timeout_seconds=settings.redis_timeout_seconds)
    document = job_report.examine(services.storage, queue, redis, job_id)
    typer.echo(json.dumps(document, indent=2) if as_json else job_report.outline(document))


@app.command("cancel")
def cancel(jobs: JobsArgument) -> None:
    """Settle jobs as canceled; a worker that is at one lets go within seconds."""
    services = _services()
    _queue_if_up(services)
    for job_id in [_find(services.storage, job) for job in jobs]:
        with _damage_explained(job_id):
            decided = services.cancel(job_id)
            outcome = services.storage.outcome(job_id)
        if decided or outcome is None:
            typer.echo(f"{job_id} is canceled")
        else:
            typer.echo(f"{job_id} had ended already: {outcome.status}")


@app.command("delete")
def delete(jobs: JobsArgument) -> None:
    """Remove jobs with all their files, damaged ones too; a worker that is at one lets go within seconds."""
    services = _services()
    _queue_if_up(services)
    for job_id in [_find(services.storage, job) for job in jobs]:
        services.remove(job_id)
        typer.echo(f"{job_id} is deleted")


@app.command("requeue")
def requeue(job: JobArgument) -> None:
    """Take a job away from a worker that hangs, or queue one that was lost.

    It goes to the front of the queue, and on after its finished spans. The attempt is not used up.
    """
    services = _services()
    _check_identity(services)  # first: without Redis the attempt would end, and nobody be told
    job_id = _find(services.storage, job)
    with _damage_explained(job_id):
        typer.echo(f"{job_id} {_requeue(services, job_id)}")


def _requeue(services: "Services", job_id: str) -> str:
    """Returns: What has become of the job.

    Raises:
        JobNotFound, ValueError: It is damaged.
        Misconfigured: It has ended, so there is nothing to queue.
    """
    storage, queue = services.storage, services.queue
    storage.load(job_id)  # a worker would stumble over a damaged one
    attempts = storage.attempts(job_id)
    if (outcome := storage.outcome(job_id)) is not None:
        raise Misconfigured(f"Job {job_id} has ended ({outcome.status}): it is not queued again.")
    last = attempts[-1] if attempts else None
    if last is None or last.end is not None:
        queued = queue.deliver(job_id, attempt=len(attempts), at_front=True)
        return "is at the front of the queue" if queued else "waits for a worker already"
    services.promises.hand_on(job_id, last, AttemptEnd.PREEMPTED)
    return f"is at the front of the queue: attempt {last.number} has ended"


def _services() -> "Services":
    """Raises: Misconfigured: There is no data directory, or no Redis is configured."""
    from service.app import build_services

    settings = read_settings(ServiceSettings)
    if not (settings.data_dir / "jobs").is_dir():  # else it would be made
        raise Misconfigured(f"{settings.data_dir} is no data directory: set IMCNET_DATA_DIR.")
    return build_services(settings)


def _queue_if_up(services: "Services") -> JobQueue | None:
    """The queue, or None, and a line that says so, where Redis does not answer.

    Raises:
        Misconfigured: It is another data directory's.
    """
    try:
        _check_identity(services)
    except QueueUnavailable:
        typer.echo(
            "imcnet: Redis does not answer: places in the queue, progress and leases are unknown", err=True
        )
        return None
    return services.queue


def _check_identity(services: "Services") -> None:
    """Raises: Misconfigured, QueueUnavailable."""
    if services.queue.storage() not in (None, services.storage.identity):
        raise Misconfigured(f"{services.settings.data_dir} is not the data directory that the API uses.")


def _find(storage: JobStorage, given: str) -> str:
    """The one job whose id begins or ends so.

    Raises:
        Misconfigured: There is none, or several.
    """
    part = given.strip().lower()
    if len(part) < _SHORTEST_ABBREVIATION:
        raise Misconfigured(f"'{given}' is too short for a job: give {_SHORTEST_ABBREVIATION} characters.")
    found = [job_id for job_id in storage.job_ids() if job_id.startswith(part) or job_id.endswith(part)]
    match found:
        case [job_id]:
            return job_id
        case []:
            raise Misconfigured(f"{_why_not_there(storage, part)}; see `imcnet jobs list`.")
        case _:
            some = ", ".join(found[:3]) + ("" if len(found) <= 3 else ", …")
            raise Misconfigured(f"{given} stands for {len(found)} jobs ({some}): give more of the id.")


def _why_not_there(storage: JobStorage, part: str) -> str:
    try:
        storage.load(part)
    except JobGone:
        return f"Job {part} has expired or was deleted"
    except JobNotFound:
        pass
    return f"There is no job {part}"


@contextmanager
def _damage_explained(job_id: str) -> Iterator[None]:
    """Raises: Misconfigured: What is stored of the job is no record."""
    try:
        yield
    except (JobNotFound, ValueError) as error:
        raise Misconfigured(
            f"The files of job {job_id} are damaged: see `imcnet jobs show`, or delete it."
        ) from error
