"""What images need of a store, asked of a real one: which, objectstores.py says."""

from __future__ import annotations

import errno
import hashlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import Daemon
from machines import SIZE
from machines import both_fixture as _both  # noqa: F401 - a fixture
from machines import here_fixture as _here  # noqa: F401 - a fixture
from objectstores import KEY, S3
from objectstores import s3_fixture as _s3  # noqa: F401 - a fixture
from objectstores import sources_fixture as _sources  # noqa: F401 - a fixture

from libmshare import ImageError, Region
from libmshare.images.load import load
from libmshare.images.manifest import PART
from libmshare.images.store import Store, Url, part_key

Sources = Callable[[str], Path]


def refused(code: int, what: Callable[[], object]) -> None:
    with pytest.raises(ImageError) as caught:
        what()
    assert caught.value.errno == code, caught.value


@pytest.fixture
def store(s3: S3, sources: Sources) -> Store:
    """A directory that other tests have nothing in."""
    sources(s3.source())
    return Store(Url("s3://images/stores/object"))


def test_a_range_is_of_one_version(store: Store) -> None:
    content = random.Random(1).randbytes(PART + 5)
    store.put("object", content)
    version = store.version("object")
    assert version[0] == len(content)
    for at, length in ((0, 1), (PART - 3, 8), (0, len(content))):
        before = store.fetched
        assert store.range("object", at, length, version) == content[at : at + length]
        assert store.fetched - before == length
    store.put("object", content)
    assert store.version("object") == version  # the same again is the same
    store.put("object", content[::-1])
    before = store.fetched
    refused(errno.ESTALE, lambda: store.range("object", 0, 8, version))
    assert store.fetched == before
    again = store.version("object")
    assert again != version
    assert store.range("object", 0, 8, again) == content[::-1][:8]


def test_an_object_that_is_replaced_before_it_comes(
    here: Daemon, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(2).randbytes(2 * PART + 5)
    store.put("replaced", content)
    with load("raw", "s3://images/stores/replaced") as region:
        assert bytes(region.buf[: len(content)]) == content
        region.unlink()
    look = Store.version

    def replaced(self: Store, key: str) -> tuple[int, str]:
        found = look(self, key)
        self.put(key, content[::-1])
        return found

    monkeypatch.setattr(Store, "version", replaced)
    refused(errno.ESTALE, lambda: load("raw", "s3://images/stores/replaced"))
    assert not (here.mount / "raw").exists()


def test_a_part_comes_in_pieces_at_one_time(store: Store) -> None:
    content = random.Random(3).randbytes(PART - 5)
    name = hashlib.sha256(content).hexdigest()
    store.put(part_key(name), content)
    assert store.has_part(name, len(content)) and not store.has_part(name, PART)
    asked, before = store.asked, store.fetched
    assert b"".join(store.part_soon(name, len(content))) == content
    assert store.asked - asked == 8 and store.fetched - before == len(content)
    whole = bytearray(len(content))

    def put(at: int, piece: memoryview) -> None:
        whole[at : at + len(piece)] = piece

    store.part(name, len(content), put)
    assert whole == content


def test_an_image_that_is_replaced_while_it_is_pulled(
    here: Daemon, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the one that was begun."""
    url, contents = "s3://images/stores/r.img", [random.Random(i).randbytes(SIZE) for i in (4, 5)]
    manifests = []
    for content in contents:
        with Region.create("r", SIZE) as region:
            region.buf[:] = content
            pushed = region.push(url)
            region.unlink()
        assert pushed.sent == SIZE
        manifests.append((pushed.digest, store.get("r.img", PART)))

    look = Store.get

    def replaced(self: Store, key: str, most: int) -> bytes:
        found = look(self, key, most)
        self.put(key, manifests[0][1])
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Store, "get", replaced)
        with Region.pull(url, digest=manifests[1][0]) as region:
            assert bytes(region.buf) == contents[1]
            region.unlink()
    refused(errno.EBADMSG, lambda: Region.pull(url, digest=manifests[1][0]))
    with Region.pull(url, digest=manifests[0][0]) as region:
        assert bytes(region.buf) == contents[0]
        region.unlink()


def test_a_part_that_is_wrong_is_no_region_and_sent_again(here: Daemon, store: Store) -> None:
    url = "s3://images/stores/wrong.img"
    content = random.Random(6).randbytes(PART)

    def push() -> int:
        with Region.create("r", SIZE) as region:
            region[:PART] = content
            pushed = region.push(url)
            region.unlink()
        return pushed.sent

    assert push() == PART and push() == 0
    store.put(part_key(hashlib.sha256(content).hexdigest()), content[:-1])
    refused(errno.EIO, lambda: Region.pull(url))
    assert push() == PART
    with Region.pull(url) as region:
        assert bytes(region.buf[:PART]) == content
        region.unlink()


def test_names_that_are_signed_as_they_are(here: Daemon, s3: S3, sources: Sources) -> None:
    """Whoever signs a request encodes them, and so does the store: in the same way."""
    sources(s3.source())
    for name in ("a+b c~d.img", "a%20b.img", "ü=&'(1)*.img", "%2541.img"):
        url = f"s3://images/names+and~more/{name}"
        with Region.create("r", SIZE) as region:
            region[1] = 1
            pushed = region.push(url)
            region.unlink()
        with Region.pull(url, digest=pushed.digest) as region:
            assert region[1] == 1
            region.unlink()


def test_what_is_not_there(store: Store) -> None:
    for url in ("s3://images/stores/nosuch.img", "s3://nosuch/r.img"):
        refused(errno.ENOENT, partial(Region.pull, url))
        refused(errno.ENOENT, partial(load, "raw", url))


def test_who_is_not_known_may_do_nothing(here: Daemon, s3: S3, sources: Sources) -> None:
    sources(s3.source())
    url = "s3://images/stores/known.img"
    with Region.create("r", SIZE) as region:
        region[0] = 1
        region.push(url)
        for key, secret in ((KEY, "wrong"), ("NOBODYSKEY", "wrong")):
            sources(s3.source(key, secret))
            refused(errno.EACCES, lambda: region.push(url))
            refused(errno.EACCES, lambda: load("raw", url))
        region.unlink()
    refused(errno.EACCES, lambda: Region.pull(url))
