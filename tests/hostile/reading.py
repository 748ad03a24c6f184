"""Decode a video within limits, as a worker's horse does: ``python -m tests.hostile.reading VIDEO BYTES``.

Prints the code of the refusal, if it is refused. Any other error ends it with a traceback.
"""

import resource
import sys
from pathlib import Path

from service.errors import UnusableVideo
from service.media import MediaLimits, out_of_memory
from service.processes import limit_resources
from worker.decode import VideoReader


def main(video: str, memory_bytes: str) -> None:
    limit_resources({resource.RLIMIT_DATA: int(memory_bytes), resource.RLIMIT_CORE: 0})
    try:
        with VideoReader(Path(video), MediaLimits(), max_corrupt_fraction=0.05) as reader:
            for _ in reader:
                pass
    except UnusableVideo as error:
        sys.stdout.write(f"{error.code}\n{error.detail}\n")
    except MemoryError:
        sys.stdout.write(f"{out_of_memory().code}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
