"""The next items are made in the background, while the caller works with the present one."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_END = object()


@contextmanager
def reading_ahead(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Make the items of an iterable in one background thread, up to `depth` ahead of the caller.

    Order and content are those of the iterable. An error that it raises comes to the caller in the place
    of the item. However the block is left, the thread ends with it, at the latest after the item that it
    is at.

    Args:
        items: iterated in the thread alone; an endless one is fine.
        depth: most items that wait for the caller, 1 or more.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:

        def ahead() -> Iterator[T]:
            waiting = deque(thread.submit(next, iterator, _END) for _ in range(depth))
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(thread.submit(next, iterator, _END))
                yield item  # pyright: ignore[reportReturnType]

        try:
            yield ahead()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
