"""Stages that run beside each other: in order, bounded, with errors that reach whoever waits, and timed."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterator[Item], *, limit: int) -> Generator[Item, None, None]:
    """Take up to ``limit`` items ahead of the reader, in a thread of its own.

    What ``items`` raises is raised in its place in the order. Closing does not wait for an item that is being
    taken: whoever feeds ``items`` has to end it.

    Raises:
        ValueError: ``limit`` is below 1 (at once).
    """
    if limit < 1:
        raise ValueError(f"limit must be positive, got {limit}")
    return _ahead(items, limit)


def _ahead(items: Iterator[Item], limit: int) -> Generator[Item, None, None]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        waiting = deque(thread.submit(_next, items) for _ in range(limit))
        while taken := waiting.popleft().result():
            waiting.append(thread.submit(_next, items))
            yield taken[0]
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _next(items: Iterator[Item]) -> tuple[Item] | None:
    """The next item, boxed; None after the last one."""
    for item in items:
        return (item,)
    return None


class WriteBehind:
    """Runs calls one after the other in a thread of its own; a context manager.

    It holds no more than ``limit`` calls: a slow writer slows down whoever gives it work. What a call raises
    is raised by the next :meth:`put` that notices, or at the end of the block. A block that ends with an
    error drops the calls that have not begun.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Future[object]] = deque()

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            while self._waiting:
                self._waiting.popleft().result()

    def put(self, call: Callable[[], object]) -> None:
        """Have ``call`` run; waits while there are ``limit`` of them."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= self._limit):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(call))


class Stopwatch:
    """Adds up the time spent in its blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began

    def during_each(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time that it takes to get them counts."""
        while True:
            with self:
                taken = _next(items)
            if taken is None:
                return
            yield taken[0]
