"""A region of which somebody untrusted can read: what belongs there, and what does not.

Who may only read has a descriptor of the memory all the same, and can map it a second
time.  A touch of an absent page there makes a page of zeros, in the file that all have,
and nothing in the kernel forbids that.  Plain memory takes no harm: zeros are what it has
where nobody has written.  Anywhere else such a page is an intruder.  So in a region that
is watched

- writers' windows are registered for MINOR faults wherever memory is not plain, and
  readers' as a whole: a page that is there comes into none of them before somebody has
  looked here whether it belongs there;
- it is known of each page of a file whether it was put there (`put`);
- what is in the stash is right, and a page in its place is an intruder's;
- in a hole, and where nobody may touch anything, there are no pages, but for those that
  are being moved away just now (`hiding`).

An intruder is taken out when it is met, and counted.

What the journal says is never ahead of memory in a way that loses anything:

- *A page of a file is put so that nobody can write to it, is written down, and only then
  may be written.*  If we die before it is written down, it is taken for an intruder, and
  read again from the file: nobody has changed it.  So what is written down was put, and
  what is not was never written to.
- *It comes back from the stash in the same way: it is put, written down, taken out of the
  stash, and only then may be written.*  So as long as it is in both, both are the same,
  and the stash's is right.
- *It goes to the stash when nobody can write to it any more: what is about to be copied is
  written down, is copied, and struck out; then it is taken out.*  Before it is struck out
  the copy may not be whole, but nothing has been taken out yet: the page that is there is
  the right one, and no intruder's, because there was a page.  After that the stash's is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator

from msharefsd.journal.journal import Journal
from msharefsd.memory.buffers import BUFFER
from msharefsd.region.objects import Object
from msharefsd.region.ranges import Ranges
from msharefsd.region.region import Region


def is_plain(item: Object) -> bool:
    """Whether zeros are right wherever nobody has written, and all may write."""
    return item.file is None and not item.guarded


class Watch:
    """What is known of the pages of one region.  Offsets are bytes from its start."""

    def __init__(self, region: Region, journal: Journal, count: Callable[[int], None]) -> None:
        """`count` is told how many pages were taken out."""
        self._region = region
        self._journal = journal
        self._count = count
        self.put = Ranges()
        """Pages of files that were put."""
        self.hiding = Ranges()
        """Where nobody may touch anything, and pages may be that are to be moved yet."""
        self.judging = False
        """Nobody untrusted is there before it is known what has been put."""
        self.look_again = -math.inf
        """When it is to be seen again whether the region has become too large."""

    # -- what was put --

    def add(self, start: int, end: int) -> None:
        """Pages of a file have been put, and cannot be written to yet.

        Raises Refused(ENOSPC): then they have to go again.
        """
        if self.put.covers(start, end):
            return
        before = self.put.touching(start, end)
        if self.judging:
            now = (
                min([start, *(low for low, _ in before)]),
                max([end, *(high for _, high in before)]),
            )
            self._journal.change_put(self._region.id, [low for low, _ in before], [now])
        self.put.add(start, end)

    def write_gone(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Write down that nothing in these is put any more.  Raises Refused(ENOSPC).

        `forget` says so here, when that has been written.
        """
        if not self.judging:
            return
        rest = Ranges()
        for start, end in ranges:
            for low, _ in self.put.within(start, end):
                found = self.put.find(low)
                assert found is not None
                rest.add(*found)
        gone = [low for low, _ in rest]
        for start, end in ranges:
            rest.remove(start, end)
        if gone:
            self._journal.change_put(self._region.id, gone, rest)

    def forget(self, start: int, end: int) -> None:
        """Nothing in [start, end) is put any more."""
        self.put.remove(start, end)

    # -- what belongs there --

    def belongs(self, found: Object | None, offset: int) -> bool:
        """Whether a page that is there, at `offset`, is one for `found` to show."""
        backing = self._region.backing
        if found is None or not found.accessible or backing is None:
            return False
        if backing.is_stashed(offset):
            return False
        return found.file is None or self.put.contains(offset)

    def around(self, found: Object, offset: int, start: int, end: int) -> tuple[int, int]:
        """How far around `offset`, where it belongs, in [start, end), that is so of all pages."""
        start, end = max(start, found.offset), min(end, found.end)
        backing = self._region.backing
        assert backing is not None
        if found.file is not None:
            whole = self.put.find(offset)
            if whole is None:
                return offset, offset
            start, end = max(start, whole[0]), min(end, whole[1])
        stash = backing.stash
        if stash is not None:
            end = min(end, stash.next_data(offset))
            if stash.next_data(start) < offset:
                start = offset
        return start, end

    def _intruded(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs of pages in [start, end) that do not belong there."""
        objects, backing = self._region.objects, self._region.backing
        if backing is None or not self.judging:
            return
        for at, last in backing.look(start, end):
            while at < last:
                found = objects.first(at, last)
                if found is None:
                    yield at, last
                    break
                if at < found.offset:
                    yield at, found.offset
                yield from self._strange(found)
                at = found.end  # noqa: PLW2901 - it goes on from there

    def _strange(self, found: Object) -> Iterator[tuple[int, int]]:
        """Of pages that are there in all of `found`, those that do not belong there."""
        backing, at = self._region.backing, found.offset
        assert backing is not None
        for start, end in self._right(found):
            if at < start:
                yield at, start
            if backing.stash is not None:
                yield from backing.stash.data(start, end - start)
            at = end
        if at < found.end:
            yield at, found.end

    def _right(self, found: Object) -> Iterator[tuple[int, int]]:
        """Where in `found` pages belong, if they are not in the stash."""
        where = (
            iter([(found.offset, found.end)])
            if found.file is None
            else self.put.within(found.offset, found.end)
        )
        if found.accessible:
            yield from where
        else:
            for start, end in where:
                yield from self.hiding.within(start, end)

    def clean(self, start: int, end: int, *, ours: bool = False) -> bool:
        """Take out what does not belong in [start, end).  Returns whether there was any.

        `ours`: it is what we have put and cannot keep.
        """
        backing = self._region.backing
        found = list(self._intruded(start, end))
        for first, last in found:
            assert backing is not None
            backing.punch(first, last - first)
            if not ours:
                self._count((last - first) // backing.page)
        return bool(found)

    def met(self, page: int) -> None:
        """An intruder has come between the look and the putting: take it out."""
        assert self._region.backing is not None
        self._region.backing.punch(page, self._region.backing.page)
        self._count(1)

    # -- the stash --

    def stash(self, start: int, end: int) -> None:
        """Move what belongs in [start, end) to the stash, and take out what does not.

        Zeros of memory that is no file's are as good when they are gone: a reader may have
        made them, and the stash is not to be filled by that.

        As Backing.stash_pages(): nobody can write there.  Raises OSError, Refused(ENOSPC).
        """
        backing = self._region.backing
        assert backing is not None
        self.clean(start, end)
        runs = list(self._movable(start, end))
        if runs:
            self._journal.stashing(self._region.id, runs)
            try:
                backing.copy_to_stash(runs)
            except OSError:
                for first, last in runs if backing.stash is not None else ():
                    backing.stash.punch(first, last - first)  # type: ignore[union-attr] # not None
                self._journal.stashed(self._region.id)
                raise
            with self._journal.transaction():
                self._journal.stashed(self._region.id)
                self.write_gone([(start, end)])
            self.forget(start, end)
        backing.punch(start, end - start)

    def _movable(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        # What has come since it was clean does not belong there, and zeros of memory do.
        backing = self._region.backing
        assert backing is not None
        for first, last in backing.data(start, end - start):
            for found in self._region.objects.within(first, last - first):
                at, strange = found.offset, list(self._strange(found)) if self.judging else []
                for low, high in [*strange, (found.end, found.end)]:
                    if found.file is None:
                        yield from self._not_zeros(at, low)
                    elif at < low:
                        yield at, low
                    at = high

    def _not_zeros(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        backing, run = self._region.backing, start
        assert backing is not None
        page = backing.page
        zeros = bytes(page)
        while start < end:
            content = os.pread(backing.fd, min(end - start, max(BUFFER, page)), start)
            if not content:
                end = start  # truncated by a sharer
            for at in range(0, len(content), page):
                if content[at : at + page] == zeros:
                    if run < start + at:
                        yield run, start + at
                    run = start + at + page
            start += len(content)
        if run < end:
            yield run, end

    # -- the next pager --

    def recover(self) -> None:
        """Of what another pager has left, decide which pages are right: see above."""
        region = self._region
        self.judging = True
        # Until what is to be hidden has been: see recovery.py.
        self.hiding.add(0, region.size)
        self._forget_half_copied()
        before = Ranges()
        for start, end in self._journal.put(region.id):
            before.add(start, end)
        self.put = self._still_there(before)
        if list(self.put) != list(before):
            self._journal.watch(region.id, self.put)
        self.clean(0, region.size)

    def _forget_half_copied(self) -> None:
        """What was being copied to the stash is where it was."""
        backing = self._region.backing
        assert backing is not None
        if backing.stash is not None:
            for start, end in self._journal.left_stashing(self._region.id):
                for first, last in list(backing.look(start, end)):
                    backing.stash.punch(first, last - first)
        self._journal.stashed(self._region.id)

    def _still_there(self, put: Ranges) -> Ranges:
        """What was put, is there, and is not in the stash as well."""
        region, here = self._region, Ranges()
        backing = region.backing
        assert backing is not None
        for item in region.objects:
            if item.file is not None:
                for low, high in put.within(item.offset, item.end):
                    for first, last in backing.look(low, high):
                        here.add(first, min(last, high))
        stash = backing.stash
        for start, end in list(stash.data(0, region.size)) if stash is not None else ():
            here.remove(start, end)
        return here
