"""The manifest of an image: what is not exactly as described is refused."""

from __future__ import annotations

import errno
import json
import mmap
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmshare import ImageError
from libmshare.images.manifest import (
    LARGEST,
    PART,
    Manifest,
    Object,
    Part,
    check_digest,
    digest_of,
    dump,
    parse,
)

RW = mmap.PROT_READ | mmap.PROT_WRITE
GOOD = Manifest(
    1 << 45,
    PART + 8192 + 5,
    "x86_64",
    "libstdc++ 6",
    "shm",
    (Object(0, PART + 4096, RW, shared=True), Object(PART + 8192, 4096, mmap.PROT_READ, False)),
    (Part(0, PART, "a" * 64), Part(PART, 4096, "b" * 64), Part(PART + 8192, 5, "a" * 64)),
)


def test_it_is_read_as_it_was_written() -> None:
    content = dump(GOOD)
    assert parse(content) == GOOD
    assert dump(parse(content)) == content
    assert check_digest(digest_of(content)) == digest_of(content)
    assert GOOD.stored() == PART + 4096 + 5


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(dump(GOOD)), **fields}).encode()


ROW = [0, PART, "a" * 64]
WRONG = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "half of it": dump(GOOD)[:-3],
    "not ASCII": dump(GOOD).replace(b"libstdc", b"libst\xc3\xa9"),
    "deep": b"[" * 100_000,
    "a long number": b'{"format": ' + b"9" * 100_000 + b"}",
    "another format": changed(format="other"),
    "another version": changed(version=2),
    "a version that is none": changed(version=True),
    "one key more": changed(more=1),
    "a key twice": dump(GOOD).replace(b'"size"', b'"start":1,"size"'),
    "not a number": dump(GOOD).replace(str(GOOD.size).encode(), b"NaN"),
    "a fraction": changed(size=4096.0),
    "a truth": changed(size=True),
    "no size": changed(size=0),
    "a huge size": changed(size=1 << 63),
    "a crooked start": changed(start=4097),
    "start 0": changed(start=0),
    "an odd machine": changed(arch="x86/64"),
    "a long tag": changed(abi="x" * 129),
    "a tag of two lines": changed(abi="a\nb"),
    "an object that is none": changed(objects=[[0, 4096, "rw"]]),
    "no list of objects": changed(objects={}),
    "an object behind the end": changed(objects=[[0, 1 << 40, "rw", "shared"]], parts=[]),
    "a crooked object": changed(objects=[[1, 4096, "rw", "shared"]], parts=[]),
    "objects that meet": changed(objects=[[0, 8192, "r", "shared"]] * 2, parts=[]),
    "an odd protection": changed(objects=[[0, 4096, "x", "shared"]], parts=[]),
    "a protection of another kind": changed(objects=[[0, 4096, ["rw"], "shared"]], parts=[]),
    "an odd kind": changed(objects=[[0, 4096, "rw", "both"]], parts=[]),
    "a part in a hole": changed(objects=[]),
    "a part in two objects": changed(
        objects=[[0, 4096, "rw", "shared"], [4096, PART - 4096, "rw", "shared"]], parts=[ROW]
    ),
    "parts that meet": changed(parts=[ROW, ROW]),
    "parts in disorder": changed(parts=[[PART, 4096, "b" * 64], ROW]),
    "a part behind the end": changed(parts=[[PART + 8192, 6, "a" * 64]]),
    "a part that is too large": changed(parts=[[0, PART + 1, "a" * 64]]),
    "an empty part": changed(parts=[[0, 0, "a" * 64]]),
    "a crooked part": changed(parts=[[1, 4096, "a" * 64]]),
    "a negative part": changed(parts=[[-4096, 4096, "a" * 64]]),
    "a name that leads elsewhere": changed(parts=[[0, 4096, "../" * 21 + "a"]]),
    "a name in capitals": changed(parts=[[0, 4096, "A" * 64]]),
    "a name that is none": changed(parts=[[0, 4096, 7]]),
    "too much": b" " * (LARGEST + 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_manifest_is_refused(what: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse(WRONG[what])
    assert caught.value.errno == errno.EBADMSG


@given(st.integers(0, len(dump(GOOD)) - 1), st.binary(min_size=1, max_size=3))
def test_whatever_was_changed_is_refused_or_a_manifest(at: int, by: bytes) -> None:
    content = dump(GOOD)
    content = content[:at] + by + content[at + len(by) :]
    try:
        found = parse(content)
    except ImageError:
        return
    assert parse(dump(found)) == found


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "a" * 63, "md5:" + "a" * 64])
def test_a_digest_is_written_in_one_way(digest: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        check_digest(digest)
