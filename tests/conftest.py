"""What all tests share: the development data, a CUDA device, a real Redis, an untrained network."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the tests of model/ run where it is not installed
    from redis import Redis

REPOSITORY = Path(__file__).resolve().parent.parent


def _skip_or_fail(reason: str, *, required_by: str) -> None:
    if os.environ.get(required_by) == "1":
        pytest.fail(f"{reason} ({required_by}=1)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The development data; see ``IMCNET_TEST_DATA`` in the README."""
    path = Path(os.environ.get("IMCNET_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (path / "clips").is_dir():
        _skip_or_fail("the development data is not here: set IMCNET_TEST_DATA", required_by="REQUIRE_DATA")
    return path


@pytest.fixture(scope="session")
def cuda_device() -> str:
    import torch

    if not torch.cuda.is_available():
        _skip_or_fail("there is no CUDA device", required_by="REQUIRE_GPU")
    return "cuda"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not depend on how the machine is configured."""
    for name in [*os.environ]:
        if name.startswith("IMCNET_") and name != "IMCNET_TEST_DATA":
            monkeypatch.delenv(name)
    monkeypatch.delenv("REDIS_URL", raising=False)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis of the test session's own."""
    from service.embedded import EmbeddedRedis

    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def redis(redis_url: str) -> "Iterator[Redis]":
    """A client of an empty database."""
    from redis import Redis

    with Redis.from_url(redis_url) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="session")
def untrained_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of an untrained resnet18 network, the same in every run."""
    from model.imcnet import IMCNetConfig
    from model.weights import init_weights

    path = tmp_path_factory.mktemp("weights") / "untrained-resnet18.safetensors"
    init_weights(path, IMCNetConfig(backbone="resnet18"), seed=0)
    return path
