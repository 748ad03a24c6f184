"""`imcnet keys`: make, list and revoke API keys, in the data directory. For operators."""

import json
from typing import Annotated

import typer

from service.cli.settings import read_settings
from service.keys import ApiKey, KeyLimits, KeyStore
from service.settings import SharedSettings

app = typer.Typer(
    help="Make, list and revoke API keys. All processes know of it within 5 seconds.", no_args_is_help=True
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for the list.")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    active_jobs: Annotated[int | None, typer.Option(min=1, help="Jobs that have not ended.")] = None,
    queued_bytes: Annotated[
        int | None, typer.Option(min=1, help="Uploads of jobs that have not ended.")
    ] = None,
    stored_bytes: Annotated[int | None, typer.Option(min=1, help="All that is stored of its jobs.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it. Only its hash is kept: this is the one time that it can be seen.

    Limits that are not given are those of the settings. With the first key, nobody gets in without one.
    """
    limits = KeyLimits(
        requests_per_minute=requests_per_minute,
        active_jobs=active_jobs,
        queued_bytes=queued_bytes,
        stored_bytes=stored_bytes,
    )
    key, text = _store().create(name, limits)
    typer.echo(json.dumps({**_document(key), "key": text}, indent=2) if as_json else text)


@app.command("list")
def list_keys(as_json: JsonOption = False) -> None:
    """List the keys, the revoked ones too, the oldest first."""
    keys = list(_store().read().values())
    if as_json:
        typer.echo(json.dumps([_document(key) for key in keys], indent=2))
        return
    for key in keys:
        state = f"revoked {key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else "valid"
        typer.echo(f"{key.id}  {key.created_at:%Y-%m-%d %H:%M}  {state:24}  {key.name}")


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `imcnet keys list` has it.")],
) -> None:
    """Revoke a key: it opens nothing any more. Its jobs stay until they expire."""
    key = _store().revoke(key_id)
    typer.echo(f"{key.id} ({key.name}) is revoked.")


def _store() -> KeyStore:
    return KeyStore(read_settings(SharedSettings).data_dir / "keys")


def _document(key: ApiKey) -> dict[str, object]:
    return key.model_dump(mode="json", exclude={"sha256"})
