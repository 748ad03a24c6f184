"""Makes every fsync of this process take longer."""

import os
import time

_SECONDS = float(os.environ["CHAOS_FSYNC_SECONDS"])
_fsync = os.fsync


def _slow_fsync(descriptor: int) -> None:
    time.sleep(_SECONDS)
    _fsync(descriptor)


os.fsync = _slow_fsync  # type: ignore[assignment]
