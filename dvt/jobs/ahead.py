"""Run threads that read images ahead of the backbone, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def reading_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Start threads for reading images that use one core each; otherwise resizing would start more threads in each."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        # The initialiser's setting is also the default of threads that start later: restore it for them.
        torch.set_num_threads(before)


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Yield each item with its future result, in order, while `depth` more are worked on.

    At most `depth` + 1 results are held, however long the list. On an early end, work that has not begun is cancelled.
    """
    queue: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            queue.append((item, pool.submit(work, item)))
            if len(queue) > depth:
                yield queue.popleft()
        while queue:
            yield queue.popleft()
    finally:
        for _, future in queue:
            future.cancel()
