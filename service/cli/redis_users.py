"""`imcnet redis-users`: passwords and access rules for a Redis of its own container. For operators."""

from pathlib import Path
from typing import Annotated

import typer


def redis_users(
    directory: Annotated[Path, typer.Argument(help="Gets a folder each for Redis, API and worker.")],
) -> None:
    """Make passwords for the API's and the worker's user of Redis, and Redis' ACL file; once."""
    from service.redis_users import create_redis_users

    made = create_redis_users(directory)
    typer.echo(f"{'Made' if made else 'There are'} users of Redis in {directory}")
