"""A SQLite database in the run directory, which one process at a time has.

One connection, in the trio thread, in WAL mode with exclusive locking: a record takes 5
to 10 microseconds then, against 50 with rollback journals and 5 with a journal in
memory, which a SIGKILL in the middle of a transaction would leave corrupt
(sqlite.org/pragma.html#pragma_journal_mode).  Nothing is synced to a disk: the memory
of regions does not survive the machine either, and a database of another boot is
thrown away.

SQLite's own locks are not used (the VFS `unix-none`): a process that was killed keeps them
while one of its threads hangs in the kernel, and its successor must not wait for that.
Who may open it is decided before: see life/lock.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import sqlite3
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Final

from msharefsd.errors import Refused, StartError, StateError

log = logging.getLogger(__name__)

COMPLAIN_SECONDS: Final = 10.0
_LEAST_PAGES: Final = 64
_MOST_LOG_PAGES: Final = 200
"""After so many the log goes into the database: often, and so never for long."""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Database:
    """One database; what is in it is its subclasses' affair."""

    file: ClassVar[str]
    """Its name in the directory."""
    schema: ClassVar[int]
    """PRAGMA user_version of what is written."""
    tables: ClassVar[str]
    """How to make it."""
    volatile: ClassVar[tuple[str, ...]]
    """What has no meaning after the machine was started anew."""
    share: ClassVar[int]
    """It takes at most one of so many parts of what its file system has for it: who fills it
    leaves room for others'."""

    def __init__(self, directory: Path | None = None) -> None:
        """Open the database in `directory`, or make it; without one keep it in memory.

        Raises StateError when what is there cannot be used, StartError when there is no room.
        """
        self._path = None if directory is None else directory / self.file
        self._depth = 0
        self._written: list[Callable[[], object]] = []
        self._complained = -math.inf
        if self._path is not None:
            _check_file(self._path)
        where = (
            "file::memory:"
            if self._path is None
            else f"{self._path.absolute().as_uri()}?vfs=unix-none"
        )
        self._database = sqlite3.connect(where, isolation_level=None, uri=True)
        weakref.finalize(self, self._database.close)
        try:
            self._open()
        except sqlite3.Error as error:
            self.close()
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
                raise StartError(
                    f"{self._path} cannot be written ({error}): make room in its file system.  "
                    "What is in it was not changed"
                ) from error
            raise StateError(
                f"{self._path} cannot be used ({error}): it is damaged, or no database of "
                "msharefsd.  Nothing was changed.  Put a good one in its place, or have msharefsd "
                "--purge --force remove it and the regions that it is about"
            ) from error
        except StartError:
            self.close()
            raise

    def _open(self) -> None:
        execute = self._database.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA foreign_keys = ON")
        execute("PRAGMA temp_store = MEMORY")  # or its file stays open in exclusive mode
        execute("PRAGMA synchronous = OFF")
        self._limit()
        (version,) = execute("PRAGMA user_version").fetchone()
        (tables,) = execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables and version != self.schema:
            raise StateError(
                f"{self._path} has schema {version}, and this msharefsd writes {self.schema}: "
                "start the version that wrote it, or have msharefsd --purge --force remove it and "
                "its regions"
            )
        if tables:
            (verdict,) = execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        execute("PRAGMA journal_mode = WAL")
        if tables and execute("SELECT id FROM boot").fetchall() != [(_boot(),)]:
            log.warning("%s is of before the machine was started: not used", self._path)
            with self.transaction():
                for table in (*self.volatile, "boot"):
                    execute(f"DELETE FROM {table}")  # noqa: S608 - the names above
                execute("INSERT INTO boot VALUES (?)", (_boot(),))
        if not tables:
            with self.transaction():
                for statement in self.tables.split(";"):
                    execute(statement)
                execute("INSERT INTO boot VALUES (?)", (_boot(),))
                execute(f"PRAGMA user_version = {self.schema}")

    def _limit(self) -> None:
        (size,) = self._database.execute("PRAGMA page_size").fetchone()
        pages = 1 << 30
        if self._path is not None:
            found = os.statvfs(self._path.parent)
            room = found.f_bavail * found.f_frsize + os.stat(self._path).st_size
            pages = max(_LEAST_PAGES, room // self.share // size)
        self._database.execute(f"PRAGMA max_page_count = {pages}")
        most = min(_MOST_LOG_PAGES, pages // 4)
        self._database.execute(f"PRAGMA wal_autocheckpoint = {most}")

    # -- writing --

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within is there as a whole, or not at all; may be nested.

        Raises Refused(ENOSPC) when it cannot be written.
        """
        self._depth += 1
        try:
            if self._depth == 1:
                self._database.execute("BEGIN IMMEDIATE")
            yield
            if self._depth == 1:
                self._database.execute("COMMIT")
                written, self._written = self._written, []
                for call in written:
                    call()
        except BaseException as error:
            self._written = []
            if self._depth == 1 and self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                self._complain(error)
                raise Refused(errno.ENOSPC, f"cannot write {self._path}: {error}") from error
            raise
        finally:
            self._depth -= 1

    def write(self, statement: str, row: tuple[object, ...]) -> None:
        """One statement, which is a transaction of its own, or a part of the one it is in.

        Raises Refused(ENOSPC) when it cannot be written.
        """
        if self._depth:
            self._database.execute(statement, row)
            return
        try:
            self._database.execute(statement, row)
        except sqlite3.Error as error:
            self._complain(error)
            raise Refused(errno.ENOSPC, f"cannot write {self._path}: {error}") from error

    def when_written(self, call: Callable[[], object]) -> None:
        """Call it when what is being written is there: at once, or after the transaction."""
        if self._depth:
            self._written.append(call)
        else:
            call()

    def _complain(self, error: sqlite3.Error) -> None:
        # A full disk, say: then every fault comes here.
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            log.error("the state cannot be written: %s", error)

    @contextlib.contextmanager
    def at_any_rate(self) -> Iterator[None]:
        """For what happens whether it can be written or not.

        What is not written here is only that something is over, or concerns a page
        that a crash in this moment would leave behind.
        """
        with contextlib.suppress(Refused), self.transaction():
            yield

    # -- for the subclasses --

    def _next(self, table: str) -> int:
        row = self._database.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)
        ).fetchone()
        return 1 if row is None else int(row[0]) + 1

    def close(self, *, remove: bool = False) -> None:
        """Let go of the database; with `remove` nothing of it stays."""
        self._database.close()
        if remove and self._path is not None:
            self.discard(self._path.parent)

    @classmethod
    def lies_in(cls, directory: Path) -> list[Path]:
        """What an open one is in; its log is there from the first write on."""
        return [directory / f"{cls.file}{suffix}" for suffix in ("", "-wal")]

    @classmethod
    def exists(cls, directory: Path) -> bool:
        """Whether there is one with anything in it."""
        try:
            return os.stat(directory / cls.file).st_size > 0
        except FileNotFoundError:
            return False

    @classmethod
    def discard(cls, directory: Path) -> None:
        """Remove what there is of one, whatever is in it."""
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(directory / f"{cls.file}{suffix}")


def signed(number: int) -> int:
    """An unsigned number of 64 bits as SQLite keeps it: inode numbers may be any."""
    return number - (1 << 64) if number >> 63 else number


def unsigned(number: int) -> int:
    """What `signed` was given."""
    return number % (1 << 64)


def marks(row: tuple[object, ...]) -> str:
    """As many question marks as the row has fields."""
    return ", ".join("?" * len(row))


def _check_file(path: Path) -> None:
    """Make the file if there is none, for us alone; refuse one that others could write.

    The directory is ours and closed to others, so nobody changes it after this.
    """
    try:
        directory = os.stat(path.parent, follow_symlinks=False)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"cannot open {path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    for what, found in ((path.parent, directory), (path, status)):
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise StateError(
                f"{what} belongs to another user or may be written by others: what is in there "
                "cannot be trusted; remove it, or give another --run-directory"
            )
    if not stat.S_ISREG(status.st_mode):
        raise StateError(f"{path} is no file: remove it")
