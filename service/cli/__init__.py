"""The `imcnet` command: the one place that may reach all three packages.

Each command imports what it runs inside its own function. API, supervisor and RQ's worker process must
stay free of torch, and `imcnet --help` must not wait seconds for it.
"""

import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from model.errors import ModelError
from service.cli import (
    ablate,
    benchmark,
    check,
    demo,
    doctor,
    evaluate,
    jobs,
    keys,
    pretrain,
    redis_users,
    segment,
    serve,
    train,
    up,
    weights,
)
from service.errors import EngineFailed, ImcnetError, QueueUnavailable
from service.threads import wait_passively

app = typer.Typer(
    name="imcnet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("up")(up.up)
app.command("serve")(serve.serve)
app.command("worker")(serve.worker)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.command("redis-users")(redis_users.redis_users)
app.command("segment")(segment.segment)
app.command("evaluate")(evaluate.evaluate)
app.command("train")(train.train)
app.command("pretrain")(pretrain.pretrain)
app.command("ablate")(ablate.ablate)
app.command("benchmark")(benchmark.benchmark)
app.command("demo")(demo.demo)
app.add_typer(weights.app, name="weights")

_EXTRAS = {
    "torch": "worker",
    "torchvision": "worker",
    "safetensors": "worker",
    "tqdm": "worker",
    "httpx": "local",
    "yaml": "evaluate",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"imcnet {version('imcnet')}")
        raise typer.Exit


@app.callback()
def imcnet(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Cuts the primary moving object out of any video."""


def main() -> None:
    """Run the command line.

    An error ends it with one line on stderr and exit code 2, or 1 where the same command may work later.
    """
    wait_passively()  # before any command imports torch; the engine of a worker inherits it
    try:
        app()
    except (ImcnetError, ModelError) as error:
        _fail(str(error), code=1 if isinstance(error, QueueUnavailable | EngineFailed) else 2)
    except OSError as error:  # a folder that cannot be made, a disk that is full
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", code=2)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(f"{error.name} is not installed: pip install 'imcnet[{_EXTRAS[error.name]}]'", code=2)


def _fail(message: str, *, code: int) -> NoReturn:
    typer.echo(f"imcnet: error: {message}", err=True)
    sys.exit(code)
