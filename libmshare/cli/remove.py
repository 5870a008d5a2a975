"""`mshare rm`: take names away."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from libmshare import core
from libmshare.cli import regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import CommandError, DaemonGoneError, explain

_WHOSE: Final = "not permitted; only its owner and root may remove a region"
_ADVICE: Final = {errno.EPERM: _WHOSE, errno.EACCES: _WHOSE}


def remove(names: Sequence[bytes], timeout: float) -> list[CommandError]:
    """Remove each region's name; its memory goes with its last sharer.

    Returns a failure for each that could not be removed.  Raises CommandError if that holds
    for all.
    """
    return bounded(lambda: _remove(names), timeout)


def _remove(names: Sequence[bytes]) -> list[CommandError]:
    regions.root()
    failures = []
    for name in names:
        try:
            regions.check_name(name)
            try:
                core.mshare_unlink(os.fsdecode(name))
            except OSError as error:
                raise explain(error, name, _ADVICE) from None
        except DaemonGoneError:
            raise
        except CommandError as failure:
            failures.append(failure)
    return failures
