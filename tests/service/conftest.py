from pathlib import Path

import pytest

from service.storage import JobStorage


@pytest.fixture
def storage(tmp_path: Path) -> JobStorage:
    storage = JobStorage(tmp_path / "data")
    storage.prepare()
    return storage
