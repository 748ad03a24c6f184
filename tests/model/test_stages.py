import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from model.stages import Stopwatch, WriteBehind, read_ahead
from tests.waiting import wait_until


class Counter:
    """Counts to ``end``; ``taken`` says how far it is."""

    def __init__(self, end: int, *, fails_at: int | None = None) -> None:
        self.taken = 0
        self._end = end
        self._fails_at = fails_at

    def __iter__(self) -> Iterator[int]:
        while self.taken < self._end:
            if self.taken == self._fails_at:
                raise OSError("no more")
            self.taken += 1
            yield self.taken


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_items_come_in_order_and_all_of_them(limit: int) -> None:
    assert [*read_ahead(iter(Counter(20)), limit=limit)] == [*range(1, 21)]


def test_no_more_items_are_taken_than_the_limit_allows() -> None:
    counter = Counter(100)
    items = read_ahead(iter(counter), limit=4)
    assert next(items) == 1
    wait_until(lambda: counter.taken == 5)
    assert not comes_true(lambda: counter.taken > 5)
    assert next(items) == 2
    wait_until(lambda: counter.taken == 6)


def comes_true(condition: Callable[[], bool], *, within_seconds: float = 0.2) -> bool:
    time.sleep(within_seconds)
    return condition()


def test_an_error_comes_in_its_place() -> None:
    items = read_ahead(iter(Counter(20, fails_at=3)), limit=5)
    assert [next(items), next(items), next(items)] == [1, 2, 3]
    with pytest.raises(OSError, match="no more"):
        next(items)


def test_none_is_an_item_like_any_other() -> None:
    assert [*read_ahead(iter([None, 0, None]), limit=2)] == [None, 0, None]


def test_closing_does_not_wait_for_an_item_that_does_not_come() -> None:
    comes = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        comes.wait()

    ahead = read_ahead(items(), limit=2)
    assert next(ahead) == 1
    ahead.close()
    comes.set()


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit"):
        read_ahead(iter([]), limit=0)


def test_calls_run_in_order_and_are_over_at_the_end_of_the_block() -> None:
    done: list[int] = []
    with WriteBehind(limit=3) as writer:
        for number in range(50):
            writer.put(partial(done.append, number))
    assert done == [*range(50)]


def test_a_slow_writer_holds_up_who_gives_it_work() -> None:
    goes_on = threading.Event()
    given: list[int] = []

    def wait() -> None:
        goes_on.wait()

    def give() -> None:
        with WriteBehind(limit=2) as writer:
            for number in range(4):
                writer.put(wait)
                given.append(number)

    giver = threading.Thread(target=give)
    giver.start()
    wait_until(lambda: len(given) == 2)
    assert not comes_true(lambda: len(given) > 2)
    goes_on.set()
    giver.join()
    assert given == [0, 1, 2, 3]


def test_the_error_of_a_call_reaches_who_gives_the_next_ones() -> None:
    def fail() -> None:
        raise OSError("broken pipe")

    with WriteBehind(limit=1) as writer:
        writer.put(fail)
        with pytest.raises(OSError, match="broken pipe"):
            writer.put(time.monotonic)


def test_the_error_of_the_last_call_is_not_lost() -> None:
    def fail() -> None:
        raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken pipe"), WriteBehind(limit=2) as writer:
        writer.put(fail)


def test_a_block_that_fails_drops_what_has_not_begun() -> None:
    begun, goes_on = threading.Event(), threading.Event()
    done: list[int] = []

    def slow() -> None:
        begun.set()
        goes_on.wait()

    def fail_with_calls_left() -> None:
        with WriteBehind(limit=5) as writer:
            writer.put(slow)
            writer.put(partial(done.append, 1))
            begun.wait()
            threading.Timer(0.1, goes_on.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        fail_with_calls_left()
    assert not done


def test_a_stopwatch_counts_the_time_that_it_takes_to_get_items_and_not_what_is_done_with_them() -> None:
    def slow() -> Iterator[int | None]:
        for item in (1, None, 3):
            time.sleep(0.02)
            yield item

    watch = Stopwatch()
    began = time.perf_counter()
    taken = []
    for item in watch.during_each(slow()):
        taken.append(item)
        time.sleep(0.1)
    elapsed = time.perf_counter() - began
    assert taken == [1, None, 3]
    assert 0.06 <= watch.seconds <= elapsed - 0.3
