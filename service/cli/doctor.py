"""`imcnet doctor`: looks at everything that the service needs, and says what to do."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from service.cli import disk_checks, machine_checks, queue_checks
from service.cli.examination import Patient, examine

CHECKS = (machine_checks.SETTINGS, *disk_checks.CHECKS, *queue_checks.CHECKS, *machine_checks.CHECKS)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at everything that the service needs, and say what is wrong and what to do. Changes nothing.

    `FAIL`: it does not work as it is, and the exit code is 1. `warn`: it does, but not for long, or not as
    well. `skip`: could not be looked at from here.
    """
    document, failed = [], False
    for check, finding in examine(Patient(), CHECKS):
        failed |= finding.level == "FAIL"
        document.append({"check": check.name, **asdict(finding)})
        if not as_json:  # each as soon as it is there: some take seconds
            typer.echo(f"{finding.level:<5} {check.name}: {finding.message}")
            if finding.advice:
                typer.echo(f"      → {finding.advice}")
    if as_json:
        typer.echo(json.dumps({"well": not failed, "findings": document}, indent=2))
    raise typer.Exit(1 if failed else 0)
