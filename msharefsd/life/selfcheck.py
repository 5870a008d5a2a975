"""Whether the mount answers, asked as a client would.

By a process of its own, never by a thread: a thread that waits for an answer of its
own process cannot be killed, and while it is there the process does not end, nor is
/dev/fuse closed, which would set it free.  A daemon that hangs could then not even be
killed for it.
"""

from __future__ import annotations

import os
import subprocess

import trio

from msharefsd.mount.names import INFO_FILE


class SelfCheck:
    """Asks for a file that no cache holds, again and again."""

    def __init__(self, root: int) -> None:
        """`root` is a descriptor of the mount's root directory; it stays the caller's.

        A path would lead to whatever is mounted over us.
        """
        self._root = root
        self._process: trio.Process | None = None

    async def answers(self, seconds: float) -> bool:
        """Whether the file can be looked up, opened and read within `seconds`.

        A question that got no answer is not put a second time, but waited for.
        Raises OSError if no process can be had to ask.
        """
        if self._process is None:
            self._process = await trio.lowlevel.open_process(
                ["cat", f"/proc/self/fd/{self._root}/{os.fsdecode(INFO_FILE)}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"LC_ALL": "C", "PATH": os.defpath},
                pass_fds=[self._root],
            )
        code = None
        with trio.move_on_after(seconds):
            code = await self._process.wait()
        if code is None:
            return False
        self._process = None
        return code == 0

    def close(self) -> None:
        """Leave nobody behind who asks."""
        if self._process is not None:
            self._process.kill()
