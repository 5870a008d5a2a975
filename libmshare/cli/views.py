"""What lists can be asked for: the words of their options."""

from __future__ import annotations

from enum import StrEnum


class Order(StrEnum):
    """Which regions come first."""

    NAME = "name"
    MEMORY = "memory"
    SIZE = "size"
    SHARERS = "sharers"
    ADDRESS = "address"
    SAVED = "saved"
    FAULTS = "faults"


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


class For(StrEnum):
    """What a region can be waited for to be."""

    CREATED = "created"
    USED = "used"
    UNUSED = "unused"
    COLLAPSED = "collapsed"
    GONE = "gone"
