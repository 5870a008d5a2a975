"""What `mshare` ends with: mshare(1), EXIT STATUS."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses.  A signal that ends it is 128 and its number (shells' convention)."""

    DONE = 0
    FAILED = 1
    """One line on standard error says why."""
    USAGE = 2
    """As of the parser itself."""
    TIME_IS_OVER = 124
    """As timeout(1): what was waited for has not come."""
    CANNOT_EXECUTE = 126
    """As env(1), for the program of `run`; the next one, too."""
    NOT_FOUND = 127
    SIGNAL = 128
