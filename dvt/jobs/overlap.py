"""Iterators that a thread advances ahead of their reader: so the backbone goes on while the solver works.

The thread advances one stream after the other, in an order that is known beforehand. Several threads that fought for
the backbone would all reach the solver together and leave the backbone idle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

import torch

Group = TypeVar("Group")
Item = TypeVar("Item")
_END: Any = object()


class Stream(Generic[Item]):
    """The items of a source that another thread makes. Iterating again reads the source again, from its beginning."""

    def __init__(self, source: Iterable[Item], ahead: Ahead[Any, Item]):
        self.source, self.ahead = source, ahead
        self.items: deque[Item] = deque()
        self.iterator: Iterator[Item] | None = None
        self.error: BaseException | None = None
        self.made = 0
        self.ended = self.was_read = False

    def __iter__(self) -> Iterator[Item]:
        if self.was_read:
            self.ahead.clear(self, ended=False)
        self.was_read = True
        while (item := self.ahead.take(self)) is not _END:
            yield item


class Ahead(Generic[Group, Item]):
    """Groups of streams, in order, while a thread works ahead of who reads them.

    The thread reads the first items of each stream of a group, then the rest of each, then the next group. It stops
    when `budget` items wait to be taken, but always makes the one that the reader waits for: any order of reading
    comes to its end. What a source or `groups` raises is raised where the reader meets it.

    Args:
        groups: run and closed in the thread; it must not wait for what the reader does.
        sources: the sources of a group's streams.
        first: how many items of each stream are read before its neighbours'.
        budget: items that may wait.

    Attributes:
        waited: seconds in which the thread waited for the reader.
    """

    def __init__(
        self,
        groups: Generator[Group, None, None],
        sources: Callable[[Group], Sequence[Iterable[Item]]],
        *,
        first: int,
        budget: int,
    ):
        self.groups, self.sources, self.first, self.budget = groups, sources, first, budget
        self.waited = 0.0
        self._changed = Condition()
        self._ready: deque[tuple[Group, list[Stream[Item]]]] = deque()
        self._wanted: Stream[Item] | None = None
        self._queued = 0
        self._error: BaseException | None = None
        self._listed = self._stopped = False  # all groups are ready; nobody reads any more
        # The order of an operation's sums depends on its number of threads: as many as the reader has.
        self._thread = Thread(target=self._run, args=(torch.get_num_threads(),), name="dvt-ahead", daemon=True)

    def __enter__(self) -> Ahead[Group, Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[Group, Sequence[Iterable[Item]]]]:
        """Each group with its streams, which are given up when the next one is asked for."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._listed)
                if not self._ready:
                    break
                group, streams = self._ready.popleft()
            yield group, streams
            for stream in streams:
                self.clear(stream, ended=True)
        if self._error is not None:
            raise self._error

    def take(self, stream: Stream[Item]) -> Item:
        """Wait for the stream's next item and take it; `_END` after the last."""
        with self._changed:
            if not stream.items and not stream.ended:
                self._wanted = stream
                self._changed.notify_all()
            self._changed.wait_for(lambda: stream.items or stream.ended)
            if stream.items:
                self._queued -= 1
                self._changed.notify_all()
                return stream.items.popleft()
        if stream.error is not None:
            raise stream.error
        return _END

    def clear(self, stream: Stream[Item], *, ended: bool) -> None:
        """Forget what a stream has made, and end it or let it begin again."""
        with self._changed:
            self._queued -= len(stream.items)
            stream.items.clear()
            stream.iterator, stream.error, stream.ended = None, None, ended
            self._changed.notify_all()

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        with closing(self.groups):
            order = self._order()
            while (stream := self._wanted_or_next(order)) is not None:
                self._advance(stream)

    def _order(self) -> Iterator[Stream[Item]]:
        """Streams as they are to be advanced, if the reader waits for none."""
        for group in self.groups:
            streams = [Stream(source, self) for source in self.sources(group)]
            with self._changed:
                self._ready.append((group, streams))
                self._changed.notify_all()
            for stream in streams:
                while stream.made < self.first and not stream.ended:
                    yield stream
            for stream in streams:
                while not stream.ended:
                    yield stream

    def _wanted_or_next(self, order: Iterator[Stream[Item]]) -> Stream[Item] | None:
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(self._can_go_on)
            if not self._listed:
                self.waited += time.perf_counter() - start
            if self._stopped:
                return None
            if self._wanted is not None:
                return self._wanted
        try:
            stream = next(order, None)
        except BaseException as error:  # it is the reader's to raise
            self._error, stream = error, None
        if stream is None:
            with self._changed:
                self._listed = True
                self._changed.notify_all()
            return self._wanted_or_next(order)
        return stream

    def _can_go_on(self) -> bool:
        return self._stopped or self._wanted is not None or (self._queued < self.budget and not self._listed)

    def _advance(self, stream: Stream[Item]) -> None:
        with self._changed:
            if stream.iterator is None and not stream.ended:
                stream.iterator = iter(stream.source)
            iterator = stream.iterator
        if iterator is None:
            return
        item, error = _END, None
        try:
            item = next(iterator, _END)
        except BaseException as caught:  # it is the reader's to raise
            error = caught
        with self._changed:
            if stream.iterator is iterator:  # the reader may have given it up, or begun again
                if self._wanted is stream:
                    self._wanted = None
                if item is _END:
                    stream.ended, stream.error = True, error
                else:
                    stream.items.append(item)
                    stream.made += 1
                    self._queued += 1
                self._changed.notify_all()


class InTurn(Generic[Group, Item]):
    """The same groups without a thread: each item is made when it is read."""

    waited = 0.0

    def __init__(self, groups: Generator[Group, None, None], sources: Callable[[Group], Sequence[Iterable[Item]]]):
        self.groups, self.sources = groups, sources

    def __enter__(self) -> InTurn[Group, Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.groups.close()

    def __iter__(self) -> Iterator[tuple[Group, Sequence[Iterable[Item]]]]:
        return ((group, self.sources(group)) for group in self.groups)
