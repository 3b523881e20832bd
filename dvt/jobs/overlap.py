"""Advance iterators in a thread ahead of their reader, so that the backbone runs while the solver works.

There are two threads. The *reader* (the caller's) takes items and solves; the *worker* (started here) makes items, that
is, it runs the backbone. The worker advances one stream after the other, in a fixed order. Several workers would
compete for the backbone, reach the solver at the same time, and leave the backbone idle.

All state that both threads use is read and written under one condition, `Ahead._changed`; each change notifies the
other thread. Items are made and solved outside of it, so neither thread holds it for long; and since there is only one
lock, no order of locks can cause a deadlock. On a GPU both threads may launch kernels; the caller chooses their
streams.
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
    """Yield the items of a source, which the worker makes. Iterating again reads the source again from its beginning.

    Attributes:
        items: items made and not yet taken.
        iterator: iterator of the source; None before the first item and after :meth:`Ahead.clear`. The worker compares
            it before and after making an item, to discard an item of a reading that was abandoned meanwhile.
        error: the source's exception; the reader raises it after taking all items.
        made: number of items made so far, over all readings.
        ended: True if the worker makes no more items.
        was_read: True if the reader has begun, so that iterating starts again.
    """

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
    """Yield groups of streams in order, while a worker thread makes items ahead of the reader.

    The worker makes the first items of each stream of a group, then the rest of each, then goes to the next group. It
    pauses while `budget` items wait to be taken, except for the stream that the reader waits for; so the two threads
    never wait for each other, whatever the order in which the reader reads. An exception of a source or of `groups` is
    raised in the reader's thread.

    Args:
        groups: a generator, run and closed in the worker; it must not wait for the reader.
        sources: makes the sources of a group's streams.
        first: number of items of each stream that are made before those of its neighbours.
        budget: the largest number of items that wait.
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
        self._changed = Condition()  # guards all state below and the streams; `waited` is only the worker's
        self._ready: deque[tuple[Group, list[Stream[Item]]]] = deque()  # groups that the reader has not yet taken
        self._wanted: Stream[Item] | None = None  # the empty stream that the reader waits for, if it waits
        self._queued = 0  # items made and not taken, over all streams
        self._error: BaseException | None = None  # exception of `groups`; the reader raises it after the last group
        self._listed = False  # set by the worker when `groups` has ended and its last group is ready
        self._stopped = False  # set by the reader when it has left the block, so nothing more is needed
        # The worker gets the reader's number of torch threads: the order of sums depends on it, and a job must give the
        # same bits with and without a worker. It is a daemon, so that it does not keep a dying process alive.
        self._thread = Thread(target=self._run, args=(torch.get_num_threads(),), name="dvt-ahead", daemon=True)

    def __enter__(self) -> Ahead[Group, Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()  # without the lock, which the worker needs to see `_stopped`

    def __iter__(self) -> Iterator[tuple[Group, Sequence[Iterable[Item]]]]:
        """Yield each group with its streams, which are abandoned when the next group is taken."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._listed)
                if not self._ready:
                    break
                group, streams = self._ready.popleft()
            yield group, streams  # the lock is free while the reader works on the group
            for stream in streams:
                self.clear(stream, ended=True)
        if self._error is not None:
            raise self._error

    def take(self, stream: Stream[Item]) -> Item:
        """Wait for the stream's next item and take it; return `_END` after the last."""
        with self._changed:
            if not stream.items and not stream.ended:
                self._wanted = stream  # the worker advances this stream next, even if the budget is spent
                self._changed.notify_all()
            self._changed.wait_for(lambda: stream.items or stream.ended)
            if stream.items:
                self._queued -= 1
                self._changed.notify_all()  # there is room in the budget again
                return stream.items.popleft()
        if stream.error is not None:
            raise stream.error
        return _END

    def clear(self, stream: Stream[Item], *, ended: bool) -> None:
        """Remove the items of a stream, and end it or let it begin again.

        The worker may be making an item of it at this moment; because `iterator` changes, that item is discarded, too.
        """
        with self._changed:
            self._queued -= len(stream.items)
            stream.items.clear()
            stream.iterator, stream.error, stream.ended = None, None, ended
            self._changed.notify_all()

    # -- in the worker ------------------------------------------------------------------------------------------------

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # for this thread only
        with closing(self.groups):  # a generator must be closed by the thread that runs it
            order = self._order()
            while (stream := self._wanted_or_next(order)) is not None:
                self._advance(stream)

    def _order(self) -> Iterator[Stream[Item]]:
        """Yield the stream to advance next, unless the reader waits for one.

        `made` and `ended` are read without the lock: only the worker makes items, and if the reader ends a stream
        meanwhile, :meth:`_advance` sees it under the lock.
        """
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
        """Wait until there is something to do and return the stream to advance; None when the reader has left."""
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(self._can_go_on)
            if not self._listed:
                self.waited += time.perf_counter() - start
            if self._stopped:
                return None
            if self._wanted is not None:
                return self._wanted
        try:  # without the lock: `groups` may read files and build models here
            stream = next(order, None)
        except BaseException as error:  # it is the reader's to raise
            self._error, stream = error, None
        if stream is None:
            with self._changed:
                self._listed = True
                self._changed.notify_all()
            return self._wanted_or_next(order)  # the reader may still begin a stream again, or leave
        return stream

    def _can_go_on(self) -> bool:
        return self._stopped or self._wanted is not None or (self._queued < self.budget and not self._listed)

    def _advance(self, stream: Stream[Item]) -> None:
        """Make one item of a stream: get the iterator under the lock, run it without the lock, store under the lock."""
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
            if stream.iterator is iterator:  # otherwise the reader has abandoned it, or begun again
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
    """Yield the same groups without a thread; each item is made when it is read."""

    waited = 0.0

    def __init__(self, groups: Generator[Group, None, None], sources: Callable[[Group], Sequence[Iterable[Item]]]):
        self.groups, self.sources = groups, sources

    def __enter__(self) -> InTurn[Group, Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.groups.close()

    def __iter__(self) -> Iterator[tuple[Group, Sequence[Iterable[Item]]]]:
        return ((group, self.sources(group)) for group in self.groups)
