"""What `mshare ptes` can be asked for: the words of its options."""

from __future__ import annotations

from enum import StrEnum


class View(StrEnum):
    """What a line is about."""

    OBJECT = "object"
    PROCESS = "process"
    USER = "user"
    UNIT = "unit"


class Sort(StrEnum):
    """What comes first."""

    TABLES = "tables"
    RECLAIMABLE = "reclaimable"
    SIZE = "size"
    SHARERS = "sharers"
    NAME = "name"
