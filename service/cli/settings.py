"""Settings for the commands: the environment's, overruled by what the command line gives."""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from model.shipped import SHIPPED_WEIGHTS
from service.errors import Misconfigured
from service.settings import SharedSettings
from worker.settings import WorkerSettings

SettingsT = TypeVar("SettingsT", bound=SharedSettings)


def read_settings(kind: type[SettingsT], **given: object) -> SettingsT:
    """Settings of ``kind``; a ``given`` value of None leaves the environment's.

    Raises:
        Misconfigured: A value is not valid; the message names its variable.
    """
    try:
        return kind.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise Misconfigured("; ".join(map(_complaint, error.errors()))) from error


def require_weights(settings: WorkerSettings) -> Path:
    """The weights file to use.

    Raises:
        Misconfigured: It is not there.
    """
    weights = settings.weights or SHIPPED_WEIGHTS
    if not weights.is_file():
        raise Misconfigured(f"There is no weights file {weights}.")
    return weights


def _complaint(error: ErrorDetails) -> str:
    if not error["loc"]:  # of several settings together
        return error["msg"].removeprefix("Value error, ")
    name = str(error["loc"][0])
    return f"{name if name.isupper() else f'IMCNET_{name.upper()}'}: {error['msg']}"
