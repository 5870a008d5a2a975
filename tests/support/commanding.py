"""The command `mshare`, as its users start it: as another user, too."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Final

from conftest import BIN

_BECOME: Final = """
# The interpreter may lie where only root can read: import first, then become the
# user, and be dumpable again (prctl(2)), as a program that the user started is.
import ctypes, os, sys
import json, rich.console, rich.table, rich.text
import libmshare.cli.app, libmshare.cli.collapse, libmshare.cli.listing, libmshare.cli.tables
from libmshare.cli.__main__ import main
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[1]))
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
del sys.argv[1:3]
main()
"""


def mshare(
    *words: object, user: int | None = None, group: int | None = None, **run: Any
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    command = [str(BIN / "mshare")]
    if user is not None:
        command = [sys.executable, "-c", _BECOME, str(user), str(group or user)]
    return subprocess.run(
        [*command, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        **run,
    )
