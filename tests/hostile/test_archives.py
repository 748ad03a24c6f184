"""Archives beyond what the old format can count, and those of the same masks, byte by byte."""

import hashlib
import io
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.jobs import EngineInfo, JobOptions, ModelInfo
from worker.artifacts import write_archive
from worker.png import encode_mask

ENTRIES = 70_000  # a plain ZIP file counts up to 65,535
NAME = re.compile(r"masks/\d{8}\.png|manifest\.json")


def masks() -> Iterator[bytes]:
    """Two pictures in turns, so that each place shows what belongs there."""
    kinds = [encode_mask(np.full((32, 32), shown)) for shown in (False, True)]
    return (kinds[number % 2] for number in range(ENTRIES))


def write(path: Path) -> Path:
    write_archive(
        path,
        ((512 * number, number / 25, mask) for number, mask in enumerate(masks())),
        size=(32, 32),
        options=JobOptions(),
        model=ModelInfo(name="m", backbone="resnet18", weights_sha256="0" * 64, trained=True),
        engine=EngineInfo(name="torch-float32", device="cpu"),
        fps=25.0,
    )
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("large") / "masks.zip")


def test_an_archive_of_many_masks_is_whole_and_has_none_but_good_names(large: Path) -> None:
    with zipfile.ZipFile(large) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        last = Image.open(io.BytesIO(archive.read(f"masks/{ENTRIES - 1:08d}.png"))).convert("L")
    assert len(names) == len({*names}) == ENTRIES + 1
    assert all(NAME.fullmatch(name) for name in names)
    assert last.getextrema() == (255, 255)


def test_another_program_reads_it(large: Path) -> None:
    unzip = shutil.which("unzip")
    if unzip is None:
        pytest.skip("unzip is not installed")
    run = subprocess.run([unzip, "-tqq", str(large)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


def test_the_same_masks_make_the_same_archive(large: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "masks.zip")
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (large, again)]
    assert digests[0] == digests[1]
