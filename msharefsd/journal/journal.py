"""What the next daemon has to know: one SQLite database in the run directory.

The memory of regions has names and outlives the daemon, and so do the sharers.  What
would die with it is everything that gives them a meaning: which region has which
memory, what is mapped where, who its sharers are.  So each change is written here
before a call is answered, and *before* memory is changed where that cannot be taken
back: the database is a redo log.  Whoever adopts it (recovery.py) finishes what it
says:

- what is in no object has no memory (munmap),
- `clearing` has ranges whose old memory must go before anything is read from them
  (mmap over something, madvise), and they are finished once that is done,
- what an object's protection forbids is protected again,
- a `dirty` page has been written to, or was about to be; a `poisoned` range raises SIGBUS
  in that sharer, or was about to.

The answer of a call that must not be done twice goes with the change it made, in one
transaction: `sharers.done` is the number of the last call that was done (wire.h), and
who repeats it is told so.

One connection, in the trio thread, in WAL mode with exclusive locking: a record takes 5
to 10 microseconds then, against 50 with rollback journals and 5 with a journal in
memory, which a SIGKILL in the middle of a transaction would leave corrupt
(sqlite.org/pragma.html#pragma_journal_mode).  Nothing is synced to a disk: the memory
of regions does not survive the machine either, and a database of another boot is
thrown away.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from msharefsd.errors import Refused, StartError
from msharefsd.journal.rows import SavedFile, SavedObject, SavedRegion, SavedSharer

log = logging.getLogger(__name__)

FILE: Final = "state.sqlite"
SCHEMA: Final = 2
"""PRAGMA user_version of what this module writes."""
COMPLAIN_SECONDS: Final = 10.0

# AUTOINCREMENT: a number is never given twice, whatever was deleted (inode numbers
# follow from regions' ids).
_TABLES: Final = """
CREATE TABLE boot (id TEXT NOT NULL);
CREATE TABLE regions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name BLOB NOT NULL,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    linked INTEGER NOT NULL,
    state TEXT NOT NULL,
    start INTEGER NOT NULL, size INTEGER NOT NULL,
    read_only INTEGER NOT NULL,
    creator INTEGER NOT NULL, made_file INTEGER NOT NULL,
    backing_kind TEXT, backing_name TEXT
) STRICT;
CREATE TABLE files (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    uid INTEGER NOT NULL,
    may_write INTEGER NOT NULL,
    path BLOB NOT NULL,
    major INTEGER NOT NULL, minor INTEGER NOT NULL, inode INTEGER NOT NULL
) STRICT;
CREATE TABLE objects (
    region INTEGER NOT NULL REFERENCES regions ON DELETE CASCADE,
    offset INTEGER NOT NULL, length INTEGER NOT NULL,
    prot INTEGER NOT NULL, private INTEGER NOT NULL,
    file INTEGER, file_offset INTEGER NOT NULL,
    PRIMARY KEY (region, offset)
) STRICT, WITHOUT ROWID;
CREATE TABLE clearing (
    region INTEGER NOT NULL REFERENCES regions ON DELETE CASCADE,
    offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (region, offset)
) STRICT, WITHOUT ROWID;
CREATE TABLE dirty (
    region INTEGER NOT NULL REFERENCES regions ON DELETE CASCADE,
    page INTEGER NOT NULL,
    PRIMARY KEY (region, page)
) STRICT, WITHOUT ROWID;
CREATE TABLE sharers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    region INTEGER NOT NULL REFERENCES regions ON DELETE CASCADE,
    pid INTEGER NOT NULL, started INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    writable INTEGER NOT NULL,
    userfaultfd INTEGER NOT NULL,
    since REAL NOT NULL,
    done INTEGER NOT NULL
) STRICT;
CREATE INDEX sharers_of ON sharers (region);
CREATE TABLE poisoned (
    sharer INTEGER NOT NULL REFERENCES sharers ON DELETE CASCADE,
    offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (sharer, offset)
) STRICT, WITHOUT ROWID;
"""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Journal:
    """The database of one daemon."""

    def __init__(self, directory: Path | None = None) -> None:
        """Open the database in `directory`, or make it; without one keep it in memory.

        Raises StartError when what is there cannot be used.
        """
        self._path = None if directory is None else directory / FILE
        self._depth = 0
        self._complained = -math.inf
        if self._path is not None:
            _check_file(self._path)
        self._database = sqlite3.connect(self._path or ":memory:", isolation_level=None)
        weakref.finalize(self, self._database.close)
        try:
            self._open()
        except sqlite3.Error as error:
            self.close()
            raise StartError(
                f"{self._path} cannot be used ({error}): it is damaged, or no database of "
                "msharefsd.  Nothing was changed.  Put a good one in its place, or remove it to "
                "start without the regions of before"
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
        execute("PRAGMA wal_autocheckpoint = 200")  # more often, and so never for long
        (version,) = execute("PRAGMA user_version").fetchone()
        (tables,) = execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables and version != SCHEMA:
            raise StartError(
                f"{self._path} has schema {version}, and this msharefsd writes {SCHEMA}: start "
                "the version that wrote it, or remove the file to start without its regions"
            )
        if tables:
            (verdict,) = execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        execute("PRAGMA journal_mode = WAL")
        if tables and execute("SELECT id FROM boot").fetchall() != [(_boot(),)]:
            log.warning("%s is of before the machine was started: not used", self._path)
            with self.transaction():
                for table in ("regions", "files", "boot"):
                    execute(f"DELETE FROM {table}")  # noqa: S608 - the names above
                execute("INSERT INTO boot VALUES (?)", (_boot(),))
        if not tables:
            with self.transaction():
                for statement in _TABLES.split(";"):
                    execute(statement)
                execute("INSERT INTO boot VALUES (?)", (_boot(),))
                execute(f"PRAGMA user_version = {SCHEMA}")

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
        except BaseException as error:
            if self._depth == 1 and self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                self._complain(error)
                raise Refused(errno.ENOSPC, f"cannot write {self._path}: {error}") from error
            raise
        finally:
            self._depth -= 1

    def _complain(self, error: sqlite3.Error) -> None:
        # A full disk, say: then every fault comes here.
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_SECONDS:
            self._complained = now
            log.error("the state cannot be written: %s", error)

    @contextlib.contextmanager
    def _at_any_rate(self) -> Iterator[None]:
        """For what happens whether it can be written or not.

        What is not written here is only that something is over, or concerns a page
        that a crash in this moment would leave behind.
        """
        with contextlib.suppress(Refused), self.transaction():
            yield

    def save_region(self, row: SavedRegion) -> None:
        """Write everything about a region but its objects and sharers.

        Raises Refused(ENOSPC), as all methods that say save.
        """
        # Not REPLACE: that is a DELETE first, and takes all that hangs on the row.
        updates = ", ".join(f"{field} = excluded.{field}" for field in SavedRegion._fields[1:])
        with self.transaction():
            self._database.execute(
                f"INSERT INTO regions VALUES ({_marks(row)}) "  # noqa: S608 - marks
                f"ON CONFLICT (id) DO UPDATE SET {updates}",
                row,
            )

    def forget_region(self, region: int) -> None:
        """It is gone, with everything that is its own."""
        with self._at_any_rate():
            self._database.execute("DELETE FROM regions WHERE id = ?", (region,))

    def empty_region(self, region: int) -> None:
        """It has no objects any more."""
        with self.transaction():
            for table in ("objects", "clearing", "dirty"):
                self._database.execute(
                    f"DELETE FROM {table} WHERE region = ?",  # noqa: S608 - the names above
                    (region,),
                )

    def save_objects(
        self,
        region: int,
        changes: Iterable[tuple[int, SavedObject | None]],
        *,
        files: Iterable[SavedFile] = (),
        call: tuple[int, int] | None = None,
        gone: tuple[int, int] | None = None,
        clearing: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Write what has changed in a region's object map since the last time.

        `changes`: offsets, and the object that begins there now; `files`: those of
        them.  With it that the `call` (sharer's number, call's number) is done; that
        nothing in the range `gone` is dirty any more; and which ranges are to be
        cleared now (offset, length).
        """
        with self.transaction():
            for file in files:
                self._database.execute(
                    f"INSERT OR IGNORE INTO files VALUES ({_marks(file)})",  # noqa: S608 - marks
                    file,
                )
            for offset, row in changes:
                if row is None:
                    self._database.execute(
                        "DELETE FROM objects WHERE region = ? AND offset = ?", (region, offset)
                    )
                else:
                    self._database.execute(
                        f"REPLACE INTO objects VALUES (?, {_marks(row)})",  # noqa: S608 - marks
                        (region, *row),
                    )
            if gone is not None:
                self._database.execute(
                    "DELETE FROM dirty WHERE region = ? AND page >= ? AND page < ?",
                    (region, gone[0], gone[0] + gone[1]),
                )
            # Whoever changes objects has the region to himself: the former ones are done.
            self._database.execute("DELETE FROM clearing WHERE region = ?", (region,))
            self._database.executemany(
                "REPLACE INTO clearing VALUES (?, ?, ?)",
                [(region, offset, length) for offset, length in clearing],
            )
            if call is not None:
                number, sequence = call
                self._database.execute(
                    "UPDATE sharers SET done = ? WHERE number = ?", (sequence, number)
                )

    def add_clearing(self, region: int, offset: int, length: int) -> None:
        """A range that has no memory has some for a moment: until the objects change next.

        Raises Refused(ENOSPC).
        """
        with self.transaction():
            self._database.execute(
                "REPLACE INTO clearing VALUES (?, ?, ?)", (region, offset, length)
            )

    def cleared(self, region: int) -> None:
        """The memory of every range that was to be cleared is gone.

        Raises Refused(ENOSPC): the caller must not let anybody write there then.
        """
        with self.transaction():
            self._database.execute("DELETE FROM clearing WHERE region = ?", (region,))

    def forget_file(self, key: int) -> None:
        """Nothing of it is mapped any more."""
        with self._at_any_rate():
            self._database.execute("DELETE FROM files WHERE key = ?", (key,))

    def save_sharer(self, row: SavedSharer) -> None:
        """Write a new sharer."""
        with self.transaction():
            self._database.execute(
                f"INSERT INTO sharers VALUES ({_marks(row)})",  # noqa: S608 - marks
                row,
            )

    def forget_sharer(self, sharer: int) -> None:
        """It is detached."""
        with self._at_any_rate():
            self._database.execute("DELETE FROM sharers WHERE number = ?", (sharer,))

    def add_dirty(self, region: int, page: int) -> None:
        """Somebody is about to write to a page that goes to a file."""
        with self._at_any_rate():
            self._database.execute("INSERT OR IGNORE INTO dirty VALUES (?, ?)", (region, page))

    def clean(self, region: int, pages: Iterable[int]) -> None:
        """These pages are in their files."""
        with self._at_any_rate():
            self._database.executemany(
                "DELETE FROM dirty WHERE region = ? AND page = ?",
                [(region, page) for page in pages],
            )

    def change_poisoned(
        self, sharer: int, gone: Iterable[int], now: Iterable[tuple[int, int]]
    ) -> None:
        """Which ranges are about to raise SIGBUS in a sharer, or do no more.

        `gone`: where ranges began that are not these any more; `now`: (start, end) of
        those that are in their place.
        """
        with self._at_any_rate():
            self._database.executemany(
                "DELETE FROM poisoned WHERE sharer = ? AND offset = ?",
                [(sharer, offset) for offset in gone],
            )
            self._database.executemany(
                "REPLACE INTO poisoned VALUES (?, ?, ?)",
                [(sharer, start, end - start) for start, end in now],
            )

    # -- reading, by the next daemon --

    def _next(self, table: str) -> int:
        row = self._database.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)
        ).fetchone()
        return 1 if row is None else int(row[0]) + 1

    def next_region(self) -> int:
        """The first id that no region ever had."""
        return self._next("regions")

    def next_sharer(self) -> int:
        """The first number that no sharer ever had."""
        return self._next("sharers")

    def next_file(self) -> int:
        """The first key that no file ever had."""
        return self._next("files")

    def regions(self) -> list[SavedRegion]:
        """Every region, oldest first."""
        rows = self._database.execute("SELECT * FROM regions ORDER BY id")
        return [SavedRegion(*row) for row in rows]

    def files(self) -> list[SavedFile]:
        """Every mapped file."""
        return [SavedFile(*row) for row in self._database.execute("SELECT * FROM files")]

    def objects(self, region: int) -> list[SavedObject]:
        """The objects of a region in order."""
        rows = self._database.execute(
            "SELECT offset, length, prot, private, file, file_offset FROM objects "
            "WHERE region = ? ORDER BY offset",
            (region,),
        )
        return [SavedObject(*row) for row in rows]

    def clearing(self, region: int) -> list[tuple[int, int]]:
        """The ranges of a region that are to be cleared: (offset, length)."""
        return self._database.execute(
            "SELECT offset, length FROM clearing WHERE region = ?", (region,)
        ).fetchall()

    def dirty(self, region: int) -> list[int]:
        """The pages of a region that may be newer than their files."""
        rows = self._database.execute("SELECT page FROM dirty WHERE region = ?", (region,))
        return [page for (page,) in rows]

    def sharers(self) -> list[SavedSharer]:
        """Every sharer, oldest first."""
        rows = self._database.execute("SELECT * FROM sharers ORDER BY number")
        return [SavedSharer(*row) for row in rows]

    def poisoned(self, sharer: int) -> list[tuple[int, int]]:
        """The ranges [start, end) that raise SIGBUS in a sharer."""
        rows = self._database.execute(
            "SELECT offset, offset + length FROM poisoned WHERE sharer = ?", (sharer,)
        )
        return rows.fetchall()

    def close(self, *, remove: bool = False) -> None:
        """Let go of the database; with `remove` nothing of it stays."""
        self._database.close()
        if remove and self._path is not None:
            for suffix in ("", "-wal", "-shm", "-journal"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self._path}{suffix}")


def _marks(row: tuple[object, ...]) -> str:
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
            raise StartError(
                f"{what} belongs to another user or may be written by others: what is in there "
                "cannot be trusted; remove it, or give another --run-directory"
            )
    if not stat.S_ISREG(status.st_mode):
        raise StartError(f"{path} is no file: remove it")
