"""sd_notify(3): tell the service manager how we are, if there is one.

The protocol is promised stable, and a datagram needs no library.
"""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import trio

log = logging.getLogger(__name__)

STATUS_SECONDS: Final = 5.0
"""How often the status is looked at; it is sent when it has changed."""
_AGAIN_SECONDS: Final = 0.2


class Manager:
    """The service manager that started us, or none."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Find it by NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._complained = False
        self.watchdog_seconds = _watchdog_seconds(environment) if self._address else None
        """How long it waits for a sign of life before it kills us; None for ever."""

    def send(self, *assignments: str, fds: Sequence[int] = ()) -> bool:
        """Send `assignments` (READY=1, ...), and descriptors, without waiting.

        Returns False if the manager's queue is full, so that it makes sense to try
        again.  Nobody there to send to is no error: whoever unset or mistyped an
        address must not lose a daemon for it.  It is logged, once.
        """
        if not self._address:
            return True
        address = self._address
        if address[0] == "@":
            address = "\0" + address[1:]
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sock:
                text = "\n".join(line.replace("\n", " ") for line in assignments)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                sock.sendmsg([os.fsencode(text)], rights if fds else [], 0, address)
        except BlockingIOError:
            return False
        except OSError as error:
            if not self._complained:
                log.warning("cannot notify NOTIFY_SOCKET=%s: %s", self._address, error)
            self._complained = True
        return True

    async def run(
        self, status: Callable[[], str], answers: Callable[[float], Awaitable[bool]]
    ) -> None:
        """Say that we are ready, then how we are, until cancelled.

        `status()` is a line for people.  `answers(seconds)` tells whether the file
        system does, and there is a sign of life only if so: it proves that this loop
        runs, and that a request still gets its answer.
        """
        if not self._address:
            return
        while not self.send("READY=1", f"STATUS={(first := status())}"):
            await trio.sleep(_AGAIN_SECONDS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_status, status, first)
            if self.watchdog_seconds is not None:
                nursery.start_soon(self._live, self.watchdog_seconds / 2, answers)

    async def _tell_status(self, status: Callable[[], str], last: str) -> None:
        while True:
            await trio.sleep(STATUS_SECONDS)
            text = status()
            if text != last and self.send(f"STATUS={text}"):
                last = text

    async def _live(self, interval: float, answers: Callable[[float], Awaitable[bool]]) -> None:
        silent = False
        while True:
            next_time = trio.current_time() + interval
            try:
                alive = await answers(interval)
            except OSError as error:
                # Without descriptors or memory nobody can be asked.  That is no reason
                # to be killed: this loop runs.
                log.debug("cannot ask whether the mount answers: %s", error)
                alive = True
            if alive:
                self.send("WATCHDOG=1")
            elif not silent:
                log.error("the mount does not answer: the service manager is not told we live")
            silent = not alive
            await trio.sleep_until(next_time)

    def stopping(self) -> None:
        """Say that the end has begun."""
        self.send("STOPPING=1", "STATUS=stopping")


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    # sd_watchdog_enabled(3): another process's watchdog is none of ours.
    try:
        if int(environment.get("WATCHDOG_PID", os.getpid())) != os.getpid():
            return None
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        log.warning("WATCHDOG_USEC and WATCHDOG_PID are not numbers: no watchdog")
        return None
    return microseconds / 1e6 if microseconds > 0 else None
