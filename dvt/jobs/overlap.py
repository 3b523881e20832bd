"""Iterators that a thread advances ahead of their reader: so the backbone goes on while the solver works.

There are two threads. The *reader* (the caller's) takes items and solves; the *worker* (started here) makes items: that
is where the backbone runs. The worker advances one stream after the other, in an order that is known beforehand. With
several workers that competed for the backbone, all of them would reach the solver together and leave it idle.

All that both threads touch is read and written under one condition, `Ahead._changed`; each change notifies the other
side. Items are made and solved outside it, so neither thread holds it for long, and with one lock there is no deadlock
by order of locks. On a GPU both threads may launch kernels; which stream they use is the caller's affair.
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
    """The items of a source, made by the worker. Iterating again reads the source again, from its beginning.

    Attributes:
        items: made and not yet taken.
        iterator: of the source; None before the first item and after :meth:`Ahead.clear`. The worker compares it to
            recognise that an item which it has just made belongs to a reading that was given up meanwhile.
        error: what the source raised; the reader raises it once it has taken all items.
        made: items made so far, over all readings.
        ended: the worker makes no more.
        was_read: the reader has begun, so that iterating means to begin again.
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
    """Groups of streams, in order, while a worker thread makes items ahead of the reader.

    The worker reads the first items of each stream of a group, then the rest of each, then the next group. It pauses
    while `budget` items wait to be taken, except for the stream that the reader waits for: so the two never wait for
    each other, in whatever order the reader reads. What a source or `groups` raises is raised in the reader's thread.

    Args:
        groups: run and closed in the worker; it must not wait for what the reader does.
        sources: the sources of a group's streams.
        first: how many items of each stream are read before its neighbours'.
        budget: items that may wait.

    Attributes:
        waited: seconds in which the worker waited for the reader.
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
        self._changed = Condition()  # guards all below and the streams; only `waited` is the worker's alone
        self._ready: deque[tuple[Group, list[Stream[Item]]]] = deque()  # groups that the reader has not asked for yet
        self._wanted: Stream[Item] | None = None  # the empty stream that the reader waits for, if it waits
        self._queued = 0  # items of all streams that are made and not taken
        self._error: BaseException | None = None  # of `groups`; the reader raises it after the last group
        self._listed = False  # set by the worker: `groups` has ended, its last group is ready
        self._stopped = False  # set by the reader: it has left the block, nothing more is needed
        # The worker gets the reader's number of torch threads: the order of an operation's sums depends on it, and the
        # same job must give the same bits with and without a worker. A daemon: it must not keep a dying process alive.
        self._thread = Thread(target=self._run, args=(torch.get_num_threads(),), name="dvt-ahead", daemon=True)

    def __enter__(self) -> Ahead[Group, Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()  # without the lock, which the worker needs to see that it is to stop

    def __iter__(self) -> Iterator[tuple[Group, Sequence[Iterable[Item]]]]:
        """Yield each group with its streams, which are given up when the next group is asked for."""
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
        """Wait for the stream's next item and take it; `_END` after the last."""
        with self._changed:
            if not stream.items and not stream.ended:
                self._wanted = stream  # the worker goes on with this one next, even if its budget is spent
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
        """Forget what a stream has made, and end it or let it begin again.

        The worker may be making an item of it right now; as `iterator` changes, that item is thrown away.
        """
        with self._changed:
            self._queued -= len(stream.items)
            stream.items.clear()
            stream.iterator, stream.error, stream.ended = None, None, ended
            self._changed.notify_all()

    # -- in the worker ------------------------------------------------------------------------------------------------

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # of this thread alone
        with closing(self.groups):  # a generator must be closed by the thread that runs it
            order = self._order()
            while (stream := self._wanted_or_next(order)) is not None:
                self._advance(stream)

    def _order(self) -> Iterator[Stream[Item]]:
        """Yield the stream to advance next, as long as the reader waits for none.

        `made` and `ended` are read without the lock: the worker alone makes items, and a stream that the reader ends
        meanwhile is noticed under the lock, in :meth:`_advance`.
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
        """Make one item of a stream: choose the iterator under the lock, run it without, hand over under the lock."""
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
