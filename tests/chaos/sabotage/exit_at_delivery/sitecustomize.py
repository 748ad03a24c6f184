"""In an API: it kills itself as it queues its first job, after the job has been stored."""

import os
import signal
import sys
from typing import Any

if "serve" in sys.orig_argv[-4:]:  # not in the Python that becomes it
    from service.queue import JobQueue

    _deliver = JobQueue.deliver

    def _die(*arguments: Any, **options: Any) -> bool:
        if os.environ["CHAOS_MOMENT"] == "after":
            _deliver(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return False

    JobQueue.deliver = _die  # type: ignore[method-assign]
