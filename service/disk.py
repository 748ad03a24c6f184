"""What the errors of the disk are called here."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import StorageFull, StorageUnavailable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors_translated() -> Iterator[None]:
    """What the block asks of the disk may fail for reasons that are not the request's.

    Raises:
        StorageFull: There is no room left.
        StorageUnavailable: Anything else is wrong with it: read-only, broken, not mounted.
    """
    try:
        yield
    except FileExistsError:
        raise  # a mistake of ours
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageFull("The storage has no room left.") from error
        raise StorageUnavailable("The storage cannot be used at the moment; try again later.") from error
