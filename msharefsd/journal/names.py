"""What the next front has to know: the names of regions, and which pager has each."""

from __future__ import annotations

from msharefsd.journal.database import Database, marks
from msharefsd.journal.rows import SavedName


class NamesJournal(Database):
    """The front's."""

    file = "names.sqlite"
    schema = 3
    # AUTOINCREMENT: a number is never given twice, whatever was deleted (inode numbers
    # follow from ids).
    tables = """
CREATE TABLE boot (id TEXT NOT NULL);
CREATE TABLE names (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name BLOB NOT NULL,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    linked INTEGER NOT NULL,
    creator INTEGER NOT NULL,
    home INTEGER NOT NULL,
    start INTEGER NOT NULL, size INTEGER NOT NULL,
    major INTEGER NOT NULL, minor INTEGER NOT NULL, inode INTEGER NOT NULL,
    identity BLOB NOT NULL,
    length INTEGER NOT NULL,
    making INTEGER NOT NULL,
    image BLOB NOT NULL
) STRICT;
"""
    volatile = ("names",)
    share = 4

    def save(self, row: SavedName) -> None:
        """Write everything about a name.  Raises Refused(ENOSPC)."""
        with self.transaction():
            self._database.execute(
                f"REPLACE INTO names VALUES ({marks(row)})",  # noqa: S608 - marks
                row,
            )

    def forget(self, number: int) -> None:
        """It is gone, and its memory."""
        with self.at_any_rate():
            self._database.execute("DELETE FROM names WHERE id = ?", (number,))

    def names(self) -> list[SavedName]:
        """Every name, oldest first."""
        rows = self._database.execute("SELECT * FROM names ORDER BY id")
        return [SavedName(*row) for row in rows]

    def next_id(self) -> int:
        """The first number that no name ever had."""
        return self._next("names")
