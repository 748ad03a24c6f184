"""Post the corpus to a private API, and print what came of it as Markdown: ``python -m tests.hostile``."""

import argparse
import sys
import tempfile
from pathlib import Path

from service.errors import UnusableVideo
from service.media import MediaLimits
from tests.hostile.api import MIB, private_api
from tests.hostile.corpus import MADE, real_clips
from worker.decode import VideoReader

HEAD = """\
# What hostile and odd inputs get

Each was posted to an API with the default limits, one after another, and what was accepted was then
decoded as a job does it. s: from the post to the answer; probe, API: peak of resident memory meanwhile.
Made by `python -m tests.hostile --clips FOLDER > docs/hostile-inputs.md`.

| input | bytes | status | code | in the job | s | probe, MiB | API, MiB |
| --- | --: | --: | --- | --- | --: | --: | --: |
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--clips", type=Path, help="folder of the development clips, to post them as well")
    given = parser.parse_args()
    entries = MADE + (real_clips(given.clips) if given.clips else ())
    sys.stdout.write(HEAD)
    with tempfile.TemporaryDirectory() as name, private_api(Path(name), silent=True) as api:
        video = Path(name) / "upload"
        for entry in entries:
            entry.build(video)
            answer = api.post(video, filename=entry.filename)
            cells = (
                entry.name,
                video.stat().st_size,
                answer.status,
                f"`{answer.code}`" if answer.code else "",
                "" if answer.job_id is None else decoded(video),
                f"{answer.seconds:.2f}",
                round(answer.probe_bytes / MIB),
                round(answer.api_bytes / MIB),
            )
            sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
            sys.stdout.flush()
            video.unlink()


def decoded(video: Path) -> str:
    """What the decoder of a job makes of a file: frames and warnings, or the error."""
    try:
        with VideoReader(video, MediaLimits(), max_corrupt_fraction=0.05) as reader:
            for _ in reader:
                pass
    except UnusableVideo as error:
        return f"`{error.code}`"
    return ", ".join((f"{reader.frames} frames", *(f"`{warning.code}`" for warning in reader.warnings)))


if __name__ == "__main__":
    main()
