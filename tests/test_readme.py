"""What the README says is so: its settings table is complete, and its library example runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from service.settings import ServiceSettings, SharedSettings
from tests.videos import moving_square, write_video
from worker.settings import WorkerSettings

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_settings_table_is_complete_and_true() -> None:
    rows = dict(re.findall(r"^\| `(IMCNET_\w+)` \| `?([^`|]*?)`? \|", README, flags=re.MULTILINE))
    expected = {
        f"IMCNET_{name.upper()}": "" if field.default is None else str(field.default)
        for settings in (SharedSettings, ServiceSettings, WorkerSettings)
        for name, field in settings.model_fields.items()
    }
    assert rows == expected


def test_the_library_example_runs(tmp_path: Path, untrained_weights: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    write_video(tmp_path / "clip.mp4", moving_square(2))
    shutil.copy(untrained_weights, tmp_path / "weights.safetensors")
    count_masks = example.replace("    ...", "    print(mask.shape)")
    run = subprocess.run(
        [sys.executable, "-c", count_masks], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == ["(48, 64)"] * 2
