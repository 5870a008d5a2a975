"""The manifest of an image: what is read and written, and nothing else; docs/image-format.md.

A manifest comes from a store, and says at which addresses this process is to write.  So it is
checked in full before anything is done: what is not exactly as described is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from libmshare.errors import ImageError

FORMAT: Final = "msharefs-image"
VERSION: Final = 1
PART: Final = 8 << 20
"""The most that a part holds (bytes): four huge pages."""
PAGE: Final = 4096
"""What offsets are multiples of (bytes)."""
LARGEST: Final = 64 << 20
"""Of a manifest (bytes): enough for parts of 4 TiB."""
MOST_OBJECTS: Final = 1 << 16
_ADDRESSES: Final = 1 << 62
_ABI: Final = re.compile(r"[ -~]{0,128}")
_WORD: Final = re.compile(r"[a-z0-9_]{1,32}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_PROTS: Final = {
    "rw": mmap.PROT_READ | mmap.PROT_WRITE,
    "r": mmap.PROT_READ,
}
_KEYS: Final = {"format", "version", "start", "size", "arch", "abi", "backing", "objects", "parts"}
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Object:
    """Something that is mapped in the region; offset and length in bytes."""

    offset: int
    length: int
    prot: int
    shared: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Contents: so many bytes at an offset, which have that SHA-256."""

    offset: int
    length: int
    hash: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image; start and size in bytes.  What no part has is zeros."""

    start: int
    size: int
    arch: str
    """As `uname -m` has it."""
    abi: str
    """What its maker calls the layout of what is in it; may be empty."""
    backing: str
    """What held the pages of the region that it was made of."""
    objects: tuple[Object, ...]
    """By offset."""
    parts: tuple[Part, ...]
    """By offset, each in one object."""

    def stored(self) -> int:
        """Bytes of contents, as they lie in the region."""
        return sum(part.length for part in self.parts)


def digest_of(content: bytes) -> str:
    """What names an image: the hash of its manifest, which has those of all parts."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def check_digest(digest: str) -> str:
    """Raises ValueError unless it is written as one."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError("a digest is written sha256: and 64 hexadecimal digits, as push tells it")
    return digest


def dump(manifest: Manifest) -> bytes:
    """The same bytes for the same image."""
    prots = {prot: word for word, prot in _PROTS.items()}
    value = {
        "format": FORMAT,
        "version": VERSION,
        "start": manifest.start,
        "size": manifest.size,
        "arch": manifest.arch,
        "abi": manifest.abi,
        "backing": manifest.backing,
        "objects": [
            [each.offset, each.length, prots[each.prot], "shared" if each.shared else "private"]
            for each in manifest.objects
        ],
        "parts": [[part.offset, part.length, part.hash] for part in manifest.parts],
    }
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def parse(content: bytes) -> Manifest:
    """What the bytes say.  Raises ImageError (EBADMSG) for what is no manifest of this version."""
    if len(content) > LARGEST:
        _refuse(f"it has more than {LARGEST} bytes")
    try:
        value = json.loads(
            content.decode("ascii"), object_pairs_hook=_without_doubles, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise ImageError(errno.EBADMSG, "this is no manifest of an image: no JSON") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        _refuse("no image is described")
    version = value.get("version")
    if type(version) is not int or version < 1:
        _refuse("it has no version")
    if version > VERSION:
        _refuse("a newer libmshare has written it")
    if value.keys() != _KEYS:
        _refuse("its keys are not those of its version")
    size = _number(value["size"], 1, _ADDRESSES)
    start = _number(value["start"], PAGE, _ADDRESSES, PAGE)
    objects = _objects(value["objects"], size)
    return Manifest(
        start,
        size,
        _text(value["arch"], _WORD),
        _text(value["abi"], _ABI),
        _text(value["backing"], _WORD),
        objects,
        _parts(value["parts"], objects, size),
    )


def _refuse(why: str) -> NoReturn:
    raise ImageError(errno.EBADMSG, f"this is no manifest of an image: {why}")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        _refuse("a key is there twice")
    return value


def _number(value: object, least: int, most: int, multiple: int = 1) -> int:
    # (bool is an int.)
    if type(value) is not int or not least <= value <= most or value % multiple:
        _refuse("a number is not what it can be")
    return value


def _text(value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        _refuse("a text is not what it can be")
    return value


def _rows(value: object, fields: int, most: int) -> list[list[object]]:
    if not isinstance(value, list) or len(value) > most:
        _refuse("a list is not what it can be")
    if any(not isinstance(row, list) or len(row) != fields for row in value):
        _refuse("a row is not what it can be")
    return value


def _objects(value: object, size: int) -> tuple[Object, ...]:
    found, behind = [], 0
    whole = -(-size // PAGE) * PAGE
    for offset, length, prot, kind in _rows(value, 4, MOST_OBJECTS):
        at = _number(offset, behind, whole, PAGE)
        behind = at + _number(length, PAGE, whole - at, PAGE)
        if not isinstance(prot, str) or prot not in _PROTS or kind not in ("shared", "private"):
            _refuse("a protection is not what it can be")
        found.append(Object(at, behind - at, _PROTS[prot], kind == "shared"))
    return tuple(found)


def _parts(value: object, objects: tuple[Object, ...], size: int) -> tuple[Part, ...]:
    found, behind = [], 0
    mapped = iter(objects)
    holder = next(mapped, None)
    for offset, length, name in _rows(value, 3, LARGEST):
        at = _number(offset, behind, size, PAGE)
        behind = at + _number(length, 1, min(PART, size - at))
        while holder is not None and holder.offset + holder.length <= at:
            holder = next(mapped, None)
        if holder is None or at < holder.offset or behind > holder.offset + holder.length:
            _refuse("a part lies where nothing is mapped")
        found.append(Part(at, behind - at, _text(name, _HASH)))
    return tuple(found)
