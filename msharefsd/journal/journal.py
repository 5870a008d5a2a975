"""What the next daemon has to know: one SQLite database in the run directory.

The memory of regions has names and outlives the daemon, and so do the sharers.  What
would die with it is everything that gives them a meaning: which region has which
memory, what is mapped where, who its sharers are.  So each change is written here
before a call is answered, and *before* memory is changed where that cannot be taken
back: the database is a redo log.  Whoever adopts it (recovery.py) finishes what it
says:

- what is in no object has no memory (munmap),
- `clearing` has ranges whose old memory must go before anything is read from them
  (mmap over something, madvise), and they are finished once that is done; where something
  is being mapped, poison must go as well,
- what an object's protection forbids is protected again,
- a `dirty` page has been written to, or was about to be; a `poisoned` range raises SIGBUS
  in that sharer, or was about to,
- a region that is `watched` has a sharer that could put pages of zeros into it: which of
  its files' pages the pager has put is in `put`, after they are there and before anybody
  may write to them; pages that are being copied to the stash are in `stashing` (watch.py).

The answer of a call that must not be done twice goes with the change it made, in one
transaction: `sharers.done` is the number of the last call that was done (wire.h), and
who repeats it is told so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Final

from msharefsd.errors import Refused
from msharefsd.journal.database import Database, marks
from msharefsd.journal.rows import SavedFile, SavedObject, SavedRegion, SavedSharer

# AUTOINCREMENT: a number is never given twice, whatever was deleted.  What it says of names is
# a copy: the front's is right, as long as there is one.
_TABLES: Final = """
CREATE TABLE boot (id TEXT NOT NULL);
CREATE TABLE regions (
    id INTEGER PRIMARY KEY,
    name BLOB NOT NULL,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    linked INTEGER NOT NULL,
    state TEXT NOT NULL,
    start INTEGER NOT NULL, size INTEGER NOT NULL,
    read_only INTEGER NOT NULL,
    creator INTEGER NOT NULL, made_file INTEGER NOT NULL,
    kind TEXT NOT NULL, backing_name TEXT, stash_name TEXT,
    stashed INTEGER NOT NULL,
    changes INTEGER NOT NULL
) STRICT;
CREATE TABLE files (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    uid INTEGER NOT NULL,
    may_write INTEGER NOT NULL,
    path BLOB NOT NULL,
    major INTEGER NOT NULL, minor INTEGER NOT NULL, inode INTEGER NOT NULL,
    awaited INTEGER NOT NULL
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
    mapping INTEGER NOT NULL,
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
CREATE TABLE watched (
    region INTEGER PRIMARY KEY REFERENCES regions ON DELETE CASCADE
) STRICT;
CREATE TABLE put (
    region INTEGER NOT NULL REFERENCES regions ON DELETE CASCADE,
    offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (region, offset)
) STRICT, WITHOUT ROWID;
CREATE TABLE stashing (
    region INTEGER NOT NULL REFERENCES regions ON DELETE CASCADE,
    offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (region, offset)
) STRICT, WITHOUT ROWID;
"""


class Journal(Database):
    """What one pager does."""

    file = "journal.sqlite"
    schema = 5
    tables = _TABLES
    volatile = ("regions", "files")
    share = 16

    def save_region(self, row: SavedRegion) -> None:
        """Write everything about a region but its objects and sharers.

        Raises Refused(ENOSPC), as all methods that say save.
        """
        # Not REPLACE: that is a DELETE first, and takes all that hangs on the row.
        updates = ", ".join(f"{field} = excluded.{field}" for field in SavedRegion._fields[1:])
        with self.transaction():
            self._database.execute(
                f"INSERT INTO regions VALUES ({marks(row)}) "  # noqa: S608 - marks
                f"ON CONFLICT (id) DO UPDATE SET {updates}",
                row,
            )

    def forget_region(self, region: int) -> None:
        """It is gone, with everything that is its own."""
        with self.at_any_rate():
            self._database.execute("DELETE FROM regions WHERE id = ?", (region,))

    def save_objects(
        self,
        region: int,
        changes: Iterable[tuple[int, SavedObject | None]],
        *,
        number: int,
        files: Iterable[SavedFile] = (),
        call: tuple[int, int] | None = None,
        gone: tuple[int, int] | None = None,
        clearing: Iterable[tuple[int, int]] = (),
        mapping: bool = False,
    ) -> None:
        """Write what has changed in a region's object map since the last time.

        `changes`: offsets, and the object that begins there now; `number`: which change of
        that region's it is; `files`: those of them.  With it that the `call` (sharer's
        number, call's number) is done; that nothing in the range `gone` is dirty any more;
        and which ranges are to be cleared now (offset, length): as they are being mapped,
        of poison as well (`mapping`).
        """
        with self.transaction():
            for file in files:
                self._database.execute(
                    f"INSERT OR IGNORE INTO files VALUES ({marks(file)})",  # noqa: S608 - marks
                    file,
                )
            self._database.execute("UPDATE regions SET changes = ? WHERE id = ?", (number, region))
            for offset, row in changes:
                if row is None:
                    self._database.execute(
                        "DELETE FROM objects WHERE region = ? AND offset = ?", (region, offset)
                    )
                else:
                    self._database.execute(
                        f"REPLACE INTO objects VALUES (?, {marks(row)})",  # noqa: S608 - marks
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
                "REPLACE INTO clearing VALUES (?, ?, ?, ?)",
                [(region, offset, length, mapping) for offset, length in clearing],
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
                "REPLACE INTO clearing VALUES (?, ?, ?, FALSE)", (region, offset, length)
            )

    def cleared(self, region: int) -> None:
        """The memory of every range that was to be cleared is gone.

        Raises Refused(ENOSPC): the caller must not let anybody write there then.
        """
        with self.transaction():
            self._database.execute("DELETE FROM clearing WHERE region = ?", (region,))

    def forget_file(self, key: int) -> None:
        """Nothing of it is mapped any more."""
        with self.at_any_rate():
            self._database.execute("DELETE FROM files WHERE key = ?", (key,))

    def save_sharer(self, row: SavedSharer) -> None:
        """Write a new sharer."""
        self.write(f"INSERT INTO sharers VALUES ({marks(row)})", row)  # noqa: S608 - marks

    def forget_sharer(self, sharer: int) -> None:
        """It is detached."""
        with contextlib.suppress(Refused):  # see at_any_rate()
            self.write("DELETE FROM sharers WHERE number = ?", (sharer,))

    def add_dirty(self, region: int, page: int) -> None:
        """Somebody is about to write to a page that goes to a file.  Raises Refused(ENOSPC)."""
        with self.transaction():
            self._database.execute("INSERT OR IGNORE INTO dirty VALUES (?, ?)", (region, page))

    def clean(self, region: int, pages: Iterable[int]) -> None:
        """These pages are in their files."""
        with self.at_any_rate():
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
        with self.at_any_rate():
            self._database.executemany(
                "DELETE FROM poisoned WHERE sharer = ? AND offset = ?",
                [(sharer, offset) for offset in gone],
            )
            self._database.executemany(
                "REPLACE INTO poisoned VALUES (?, ?, ?)",
                [(sharer, start, end - start) for start, end in now],
            )

    def watch(self, region: int, put: Iterable[tuple[int, int]]) -> None:
        """What is in the region's files' pages is written down from now on.

        `put`: (start, end) of what is there.  Raises Refused(ENOSPC).
        """
        with self.transaction():
            self._database.execute("REPLACE INTO watched VALUES (?)", (region,))
            self._database.execute("DELETE FROM put WHERE region = ?", (region,))
            self._put(region, (), put)

    def change_put(self, region: int, gone: Iterable[int], now: Iterable[tuple[int, int]]) -> None:
        """Which ranges have been put: `gone` and `now` as in change_poisoned().

        Raises Refused(ENOSPC).
        """
        with self.transaction():
            self._put(region, gone, now)

    def _put(self, region: int, gone: Iterable[int], now: Iterable[tuple[int, int]]) -> None:
        self._database.executemany(
            "DELETE FROM put WHERE region = ? AND offset = ?",
            [(region, offset) for offset in gone],
        )
        self._database.executemany(
            "REPLACE INTO put VALUES (?, ?, ?)",
            [(region, start, end - start) for start, end in now],
        )

    def stashing(self, region: int, runs: Iterable[tuple[int, int]]) -> None:
        """What is about to be copied to the stash: (start, end).  Raises Refused(ENOSPC)."""
        with self.transaction():
            self._database.executemany(
                "REPLACE INTO stashing VALUES (?, ?, ?)",
                [(region, start, end - start) for start, end in runs],
            )

    def stashed(self, region: int) -> None:
        """All of that is in the stash as a whole, or none of it.  Raises Refused(ENOSPC)."""
        with self.transaction():
            self._database.execute("DELETE FROM stashing WHERE region = ?", (region,))

    # -- reading, by the next pager --

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

    def clearing(self, region: int, *, mapping: bool | None = None) -> list[tuple[int, int]]:
        """The ranges of a region that are to be cleared: (offset, length).

        `mapping`: only those that are being mapped, or only the others.
        """
        return self._database.execute(
            "SELECT offset, length FROM clearing WHERE region = ? AND mapping = ifnull(?, mapping)",
            (region, mapping),
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

    def watched(self, region: int) -> bool:
        """Whether somebody could put pages of zeros into it."""
        rows = self._database.execute("SELECT 1 FROM watched WHERE region = ?", (region,))
        return rows.fetchone() is not None

    def put(self, region: int) -> list[tuple[int, int]]:
        """The ranges [start, end) of files' pages that were put."""
        return self._ranges("put", region)

    def left_stashing(self, region: int) -> list[tuple[int, int]]:
        """The ranges [start, end) that may be in the stash in part."""
        return self._ranges("stashing", region)

    def _ranges(self, table: str, region: int) -> list[tuple[int, int]]:
        return self._database.execute(
            f"SELECT offset, offset + length FROM {table} WHERE region = ?",  # noqa: S608 - ours
            (region,),
        ).fetchall()
