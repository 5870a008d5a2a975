"""What each user may have of the daemon, so that none takes what the others need.

A user is an effective user id at the time of connect(2) or open(2).  Regions, their
memory and their objects count for the owner of the region's file, as blocks count
for the owner of a file; sharers and connections for the user whose process it is.

Counts that could drift are not kept: an account holds the regions and the sharers
themselves, and what is asked of it is counted from them.  The one number kept is
`connections`, and it goes up and down in one place.

root and the daemon's own user are exempt, as root is from quotas: they could end the
daemon, or change its configuration.  The exception is threads: who waits for one
waits for a file, and that may happen to root's programs too.  Containers whose root
is the machine's can be given numbers of their own (`[limits.user.root]`).
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Sized
from typing import Final, Protocol
from weakref import WeakValueDictionary

from msharefsd import config
from msharefsd.config import Allowance, LimitSettings
from msharefsd.errors import Refused
from msharefsd.linux import syscalls

LOOK: Final = 64 << 20
"""Bytes that a user may populate before their memory is added up again."""
SHARE_OF_LOOKING: Final = 0.05
"""How much of the time may go into adding up the memory of a user who has no more."""


class Holding(Protocol):
    """What an account needs to know of a region."""

    @property
    def objects(self) -> Sized:
        """Its objects."""

    def allocated(self) -> int:
        """Bytes of memory that it holds."""


class Account:
    """What one user has.  Made by Limits; lives as long as the user has anything."""

    def __init__(
        self,
        uid: int = 0,
        allowance: Allowance = config.UNLIMITED,
        pool: Callable[[], int] = lambda: 0,
        hit: Callable[[str, str], None] = lambda _limit, _message: None,
        keep: Callable[[int], int] = lambda _: config.LARGEST_SIZE,
    ) -> None:
        """`pool`, `hit`: see Limits; `keep(held)`: how much who holds so much may have more."""
        self.uid = uid
        self.allowance = allowance
        self.regions: set[Holding] = set()
        self.sharers: set[object] = set()
        self.connections = 0
        self._pool = pool
        self._hit = hit
        self._keep = keep
        self._credit: float = math.inf if allowance.memory == config.NO_LIMIT else 0
        self._look_again = 0.0

    # -- what can be counted --

    def check_regions(self) -> None:
        """Raise Refused(EDQUOT) if the user may have no more names or regions."""
        self._check("regions", len(self.regions) + 1, self.allowance.regions, errno.EDQUOT)

    def check_sharers(self) -> None:
        """Raise Refused(EMFILE) if the user may have no more sharers."""
        self._check("sharers", len(self.sharers) + 1, self.allowance.sharers, errno.EMFILE)

    def has_too_many_sharers(self) -> bool:
        """Whether some came without being asked for."""
        most = self.allowance.sharers
        return most != config.NO_LIMIT and len(self.sharers) > int(most)

    def check_objects(self, more: int) -> None:
        """Raise Refused(ENOMEM) if the user's regions may not have that many more objects.

        ENOMEM is what mmap(2) says when a process has too many mappings.
        """
        if self.allowance.objects != config.NO_LIMIT:
            count = sum(len(region.objects) for region in self.regions)
            self._check("objects", count + more, self.allowance.objects, errno.ENOMEM)

    @contextlib.contextmanager
    def connection(self) -> Iterator[None]:
        """A connection of the user's, as long as this lasts.  Raises Refused(EMFILE)."""
        self._check("connections", self.connections + 1, self.allowance.connections, errno.EMFILE)
        self.connections += 1
        try:
            yield
        finally:
            self.connections -= 1

    def _check(self, limit: str, count: int, most: int | str, code: int) -> None:
        if most != config.NO_LIMIT and count > int(most):
            raise self._refusal(limit, str(most), code)

    def _refusal(self, limit: str, most: str, code: int) -> Refused:
        message = f"user {self.uid} may have {most} {limit}: see [limits] {limit} of msharefsd"
        self._hit(limit, message)
        return Refused(code, message)

    # -- memory --

    def room(self, wanted: int) -> int:
        """How much of `wanted` bytes more memory the user may have; it counts as taken.

        Page faults ask this.  The regions are asked what they hold only once in
        LOOK bytes, and when little is left.
        """
        if self._credit < wanted and time.monotonic() >= self._look_again:
            self._look(wanted)
        given = int(min(wanted, self._credit))
        self._credit -= given
        return given

    def _look(self, wanted: int) -> None:
        since = time.monotonic()
        held = self.memory()
        left = min(self._memory_limit() - held, self._keep(held))
        self._credit = max(0, min(left, max(LOOK, wanted)))  # a page may have 1 GiB
        if left < syscalls.PAGE:
            # Somebody with many regions and no room must not cost others their faults.
            now = time.monotonic()
            self._look_again = now + (now - since) / SHARE_OF_LOOKING

    def freed(self) -> None:
        """Memory of the user's has become free: look again at once."""
        self._look_again = 0.0

    def check_memory(self) -> None:
        """Raise Refused(EDQUOT) if the user's regions hold more than they may."""
        if self.allowance.memory != config.NO_LIMIT and self.memory() > self._memory_limit():
            raise self._refusal("memory", self.allowance.memory, errno.EDQUOT)

    def is_over(self) -> bool:
        """Whether the user's regions hold more than they may."""
        return self.allowance.memory != config.NO_LIMIT and self.memory() > self._memory_limit()

    def memory(self) -> int:
        """Bytes that the user's regions hold."""
        return sum(region.allocated() for region in self.regions)

    def _memory_limit(self) -> int:
        return config.share_of(self.allowance.memory, self._pool()) // syscalls.PAGE * syscalls.PAGE


class Limits:
    """The accounts of all users."""

    def __init__(
        self,
        settings: LimitSettings | None = None,
        pool: Callable[[], int] = lambda: 0,
        hit: Callable[[str, str], None] = lambda _limit, _message: None,
        free: Callable[[], int] = lambda: config.LARGEST_SIZE,
    ) -> None:
        """Without `settings` nothing is limited.

        `pool()` is how much memory there is for regions in all, in bytes: what a
        percentage is of; `free()` is how much of it nobody has.  `hit(limit, message)` is
        told of each refusal.
        """
        self._settings = settings
        self._users = {} if settings is None else settings.users()
        self._pool = pool
        self._hit = hit
        self._free = free
        self._accounts: WeakValueDictionary[int, Account] = WeakValueDictionary()

    def account(self, uid: int) -> Account:
        """The account of a user; keep it as long as it is to remember anything."""
        account = self._accounts.get(uid)
        if account is None:
            account = Account(uid, self.allowance(uid), self._pool, self._hit, self._keep)
            self._accounts[uid] = account
        return account

    def _keep(self, held: int) -> int:
        """How much who holds `held` bytes may have more, so that others find something.

        The last part of what there is goes to those who hold less than that part: who has
        much cannot take it all, however many users there are who have nothing yet.
        """
        if self._settings is None:
            return config.LARGEST_SIZE
        reserve = config.share_of(self._settings.reserve, self._pool())
        return self._free() - (reserve if held >= reserve else 0)

    def threads(self, uid: int) -> int:
        """How many threads may read and write files for a user at one time."""
        return self.allowance(uid).threads

    def allowance(self, uid: int) -> Allowance:
        """What a user may have."""
        if self._settings is None:
            return config.UNLIMITED
        if uid in self._users:
            return self._users[uid]
        if uid in (0, os.geteuid()):
            return config.unlimited(self._settings.threads)
        return self._settings
