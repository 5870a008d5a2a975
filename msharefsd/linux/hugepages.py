"""Which huge pages the kernel has."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

SYSFS: Final = Path("/sys/kernel/mm/hugepages")


def sizes() -> list[int]:
    """The sizes of huge pages that this kernel has, in bytes."""
    with contextlib.suppress(OSError):
        names = [re.fullmatch(r"hugepages-(\d+)kB", name) for name in os.listdir(SYSFS)]
        return sorted(int(match[1]) << 10 for match in names if match)
    return []
