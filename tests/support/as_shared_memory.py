"""CPython's own tests of multiprocessing.shared_memory, with regions behind it.

Run as a program: exits with 0 if all pass but those that are named here.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from multiprocessing import shared_memory
from typing import Any

import libmshare
from libmshare import Region

NOT_OURS = {
    "test_shared_memory_cleaned_after_process_termination": "about the resource tracker, which "
    "removes what others still use",
    "test_shared_memory_tracking": "about the resource tracker",
    "test_shared_memory_untracking": "about the resource tracker",
    "test_shared_memory_SharedMemoryManager_reuses_resource_tracker": "about that, too",
    "test_shared_memory_resize": "a region has one size",
}


class Adapter:
    """SharedMemory, as far as it is documented, and the private names that the tests know."""

    _flags = os.O_RDWR

    def __init__(
        self,
        name: str | None = None,
        create: bool = False,  # noqa: FBT002 - as there
        size: int = 0,
        **_: Any,
    ) -> None:
        if size < 0 or (create and size == 0) or (name is None and not create):
            raise ValueError("size must be positive, and what is attached has a name")
        while True:
            self._name = name or shared_memory._make_filename()  # type: ignore[attr-defined]
            try:
                if create:
                    self._region = Region.create(self.name, size)
                else:
                    self._region = Region.attach(self.name)
                break
            except FileExistsError:
                if name:
                    raise
        self.size = len(self._region)
        self.buf: memoryview | None = self._region.buf

    @property
    def name(self) -> str:
        return self._name.lstrip("/")

    def close(self) -> None:
        self.buf = None
        self._region.close()

    def unlink(self) -> None:
        libmshare.mshare_unlink(self.name)

    def __del__(self) -> None:
        if hasattr(self, "_region"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__class__, (self.name, False, self.size)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.name!r}, size={self.size})"


def main() -> int:
    """Run them; 77 if this Python has no tests."""
    shared_memory.SharedMemory = Adapter  # type: ignore[assignment,misc]
    try:
        cpython: Any = importlib.import_module("test._test_multiprocessing")
    except ImportError:
        return 77
    kind = type(
        "SharedMemoryTests",
        (cpython._TestSharedMemory, cpython.ProcessesMixin, unittest.TestCase),
        {"__module__": "__main__"},
    )
    globals()[kind.__name__] = kind
    names = unittest.TestLoader().getTestCaseNames(kind)
    ours = unittest.TestSuite(kind(name) for name in names if name not in NOT_OURS)
    result = unittest.TextTestRunner(verbosity=2).run(ours)
    return 0 if result.wasSuccessful() and result.testsRun >= 8 else 1


if __name__ == "__main__":
    sys.exit(main())
