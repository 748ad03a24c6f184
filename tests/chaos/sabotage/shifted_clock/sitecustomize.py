"""Moves the wall clock of this process; everything that is imported later sees it that way."""

import datetime
import os
import time

_SECONDS = float(os.environ["CHAOS_CLOCK_SECONDS"])
_time, _time_ns, _datetime = time.time, time.time_ns, datetime.datetime


class _Alike(type):
    """Real times count as instances of the shifted class: C code goes on making them."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _datetime)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _datetime)


class _Shifted(_datetime, metaclass=_Alike):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return _datetime.now(tz) + datetime.timedelta(seconds=_SECONDS)

    @classmethod
    def utcnow(cls) -> datetime.datetime:
        return cls.now(datetime.UTC).replace(tzinfo=None)


time.time = lambda: _time() + _SECONDS
time.time_ns = lambda: _time_ns() + round(_SECONDS * 1e9)
datetime.datetime = _Shifted  # type: ignore[misc]
