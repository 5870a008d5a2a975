"""Huge pages of 2 MiB, reserved while something is measured or tested."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HUGE: Final = 2 << 20
_SETTING: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
_GIVE_BACK: Final = """
cat
cd "$1"
left=$(($(cat nr_hugepages) - $(cat surplus_hugepages) - $2))
echo $((left > 0 ? left : 0)) > nr_hugepages
"""
"""When its input ends, as it does when we are killed: less by ours, for somebody else may
have reserved some meanwhile."""


def free_huge_pages() -> int:
    """How many are free; 0 on a kernel without them."""
    with contextlib.suppress(OSError):
        return int(_SETTING.with_name("free_hugepages").read_text())
    return 0


def reserved_huge_pages() -> int:
    """How many are reserved.  nr_hugepages counts surplus ones, too; writing it does not."""
    surplus = int(_SETTING.with_name("surplus_hugepages").read_text())
    return int(_SETTING.read_text()) - surplus


class NoHugePagesError(Exception):
    """They cannot be reserved."""


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many free huge pages more than there were.  Raises NoHugePagesError."""
    try:
        before = reserved_huge_pages()
        # Those that are there beyond the reserved ones, in use, become such first.
        wanted = int(_SETTING.read_text()) + count
        _SETTING.write_text(str(wanted))
        if reserved_huge_pages() < wanted:
            # There may be memory enough, in pieces.
            Path("/proc/sys/vm/compact_memory").write_text("1")
            _SETTING.write_text(str(wanted))
        missing = wanted - reserved_huge_pages()
        ours = reserved_huge_pages() - before
    except OSError as error:
        raise NoHugePagesError(f"no huge pages to be had: {error}") from error
    with subprocess.Popen(
        ["sh", "-c", _GIVE_BACK, "sh", str(_SETTING.parent), str(ours)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    ):
        if missing > 0:
            raise NoHugePagesError(f"{count} huge pages cannot be reserved")
        yield
