"""An object store, as far as images need one; by obstore.

Every answer is checked here: how long it is, which version of the object it is of, and what is
in it.  There are servers that ignore the condition of a request, and proxies that cut.

Credentials are found as the platform has them (its environment, files, metadata service), or in
sources.toml (sources.py).  They are in no URL: those are in /proc, in logs and in what region files
say.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from libmshare.errors import ImageError
from libmshare.extras import cure
from libmshare.images import crew, sources

if TYPE_CHECKING:
    from obstore import GetResult

SCHEMES: Final = ("s3", "gs", "az", "http", "https", "file")
PARTS: Final = "parts"
"""The directory of parts, beside manifests."""
PATIENCE: Final = timedelta(seconds=30)
"""How long a store that is not reached, or answers that it cannot, is asked again."""
ANSWER: Final = timedelta(seconds=60)
"""How long one answer may take, to its last byte."""
CONNECT: Final = timedelta(seconds=5)
_WORST: Final = 300
"""How much of a store's own words is told."""
TRIES: Final = 2
"""How often a part is asked for whose answer ends too early, or is wrong."""
_AGAIN: Final = {errno.EIO, errno.EHOSTUNREACH, errno.ETIMEDOUT}
_PIECE: Final = 1 << 20
"""At least so much of an answer is taken at one time (bytes)."""
_RANGES: Final = 8
"""By so many requests a part comes that is wanted soon."""

Put = Callable[[int, memoryview], object]
"""Told where in a part some bytes are, and these."""


class Url:
    """Where an image is: a directory, and its name there.  Raises ImageError (EINVAL)."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            user = parts.username or parts.password
        except ValueError:
            raise ImageError(errno.EINVAL, "this is no URL") from None
        if parts.scheme not in SCHEMES:
            raise ImageError(errno.EINVAL, f"a URL begins with one of {', '.join(SCHEMES)}")
        if user or parts.query or parts.fragment or "?" in url or "#" in url:
            # (It is not said again: what is wrong there may be a secret.)
            raise ImageError(
                errno.EINVAL,
                "a URL has no credentials, query or fragment in it: everybody sees it",
            )
        directory, _, name = parts.path.rpartition("/")
        self.name = unquote(name)
        self.directory = f"{parts.scheme}://{parts.netloc}{directory}"
        self.scheme = parts.scheme
        if not self.name.strip(".") or "/" in self.name or not self.name.isprintable():
            raise ImageError(errno.EINVAL, "a URL ends with the name of an object")
        if parts.scheme != "file" and not parts.netloc:
            raise ImageError(errno.EINVAL, "a URL says which bucket or host")

    def __str__(self) -> str:
        return f"{self.directory}/{self.name}"


_used: Final[dict[str, int]] = {}
"""By which process obstore was used first."""


def _library() -> Any:
    try:
        import obstore  # noqa: PLC0415 - an extra
        import obstore.store  # noqa: PLC0415
    except ImportError as error:
        raise ImageError(errno.EOPNOTSUPP, f"images need obstore: {cure('images')}") from error
    # Its threads are not in a child, and what it does there would wait for them for ever.
    if _used.setdefault("by", os.getpid()) != os.getpid():
        raise ImageError(
            errno.EDEADLK, "a store was used before this process was forked: start it by spawn"
        )
    return obstore


class Store:
    """One directory of a store.

    Synchronization: any thread may call any method.
    """

    def __init__(self, url: Url, *, make: bool = False) -> None:
        """`make`: a directory of the file system, if there is none.  Raises ImageError."""
        self._library = _library()
        self.asked = 0
        """How many requests were made, as far as we know."""
        self.fetched = 0
        """Bytes that came."""
        self._lock = threading.Lock()
        settings = sources.settings(url)
        more: dict[str, Any] = {}
        if url.scheme == "file":
            more = {"mkdir": make}
        else:
            more["retry_config"] = {
                "max_retries": 10,
                "retry_timeout": PATIENCE,
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "base": 2.0,
                    "max_backoff": timedelta(seconds=5),
                },
            }
            client: dict[str, Any] = {"timeout": ANSWER, "connect_timeout": CONNECT}
            endpoint = settings.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL", "")
            if url.scheme == "http" or endpoint.startswith("http://"):
                client["allow_http"] = True
            more["client_options"] = client
            if settings:
                more["config"] = settings
        with self._explained(url.directory):
            self._store = self._library.store.from_url(url.directory, **more)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """What obstore raises, as ImageError."""
        known = self._library.exceptions
        try:
            yield
        except FileNotFoundError as error:
            raise ImageError(errno.ENOENT, "it is not in the store", what) from error
        except (known.PermissionDeniedError, known.UnauthenticatedError, PermissionError) as error:
            raise ImageError(errno.EACCES, "the store says that this is not allowed", what) from (
                None if what else error
            )
        except known.PreconditionError:
            raise ImageError(errno.ESTALE, "it was replaced meanwhile", what) from None
        except known.NotSupportedError:
            raise ImageError(errno.EOPNOTSUPP, "this store cannot do that", what) from None
        except (known.BaseError, ValueError) as error:
            raise ImageError(_code_of(error), f"the store failed: {_words(error)}", what) from None

    def _get(self, key: str, **options: Any) -> GetResult:
        with self._lock:
            self.asked += 1
        result: GetResult = self._library.get(self._store, key, options=options or None)
        return result

    def _came(self, came: int, length: int, key: str) -> None:
        with self._lock:
            self.fetched += came
        if came != length:
            raise ImageError(errno.EIO, f"the answer has {came} bytes instead of {length}", key)

    def get(self, key: str, most: int) -> bytes:
        """A small object.  Raises ImageError, of EFBIG too."""
        with self._explained(key):
            result = self._get(key)
            if (length := result.meta["size"]) > most:
                raise ImageError(errno.EFBIG, f"it has {length} bytes", key)
            data = bytes(result.bytes())
            self._came(len(data), length, key)
            return data

    def part(self, name: str, length: int, put: Put, tries: int = TRIES) -> None:
        """Fetch a part, whose contents are what it is called: `put` is told them as they come.

        If they are wrong they come once more, or `tries` times in all.  They are right when this
        has returned.  Raises ImageError, of EIO if they are not; what `put` raises.
        """
        key = part_key(name)
        for left in reversed(range(tries)):
            try:
                found, at = hashlib.sha256(), 0
                for piece in self._pieces(key, length):
                    found.update(piece)
                    put(at, piece)
                    at += len(piece)
                _check(found.hexdigest(), name, key)
                return
            except ImageError as error:
                if error.errno not in _AGAIN or not left:
                    raise

    def _pieces(self, key: str, length: int) -> Iterator[memoryview]:
        """All of an object that has so many bytes, as it comes."""
        with self._explained(key):
            result, came = self._get(key), 0
            if (size := result.meta["size"]) != length:
                raise ImageError(errno.EIO, f"it has {size} bytes instead of {length}", key)
            for piece in result.stream(min_chunk_size=_PIECE):
                came += len(piece)
                if came <= length:
                    yield memoryview(piece)
            self._came(came, length, key)

    def part_soon(self, name: str, length: int) -> list[memoryview]:
        """The same, in pieces that come at one time: one connection is only as wide as it is.

        Not every store has ranges.  Raises ImageError.
        """
        key, step = part_key(name), max(_PIECE, -(-length // _RANGES))
        starts = range(0, length, step)
        pieces = [memoryview(b"")] * len(starts)

        def fetch(number: int) -> None:
            start, end = starts[number], min(starts[number] + step, length)
            of = {"range": (start, end)} if len(starts) > 1 else {}
            with self._explained(key):
                result = self._get(key, **of)
                if result.meta["size"] != length or tuple(result.range) != (start, end):
                    raise ImageError(errno.EIO, "the answer is another part of it", key)
                data = memoryview(result.bytes())
            self._came(len(data), end - start, key)
            pieces[number] = data

        crew.each(range(len(starts)), fetch, width=len(starts))
        found = hashlib.sha256()
        for piece in pieces:
            found.update(piece)
        _check(found.hexdigest(), name, key)
        return pieces

    def version(self, key: str) -> tuple[int, str]:
        """The size of an object, and what tells this version of it from others."""
        with self._explained(key):
            with self._lock:
                self.asked += 1
            return _version(self._library.head(self._store, key), key)

    def range(self, key: str, offset: int, length: int, version: tuple[int, str]) -> memoryview:
        """A part of an object, of that version.  Raises ImageError, of ESTALE if it is not."""
        for left in reversed(range(TRIES)):
            try:
                with self._explained(key):
                    match = {"if_match": version[1]} if version[1].startswith('"') else {}
                    result = self._get(key, range=(offset, offset + length), **match)
                    if _version(result.meta, key) != version:
                        raise ImageError(errno.ESTALE, "it was replaced meanwhile", key)
                    if tuple(result.range) != (offset, offset + length):
                        raise ImageError(errno.EIO, "the answer is another part of it", key)
                    data = memoryview(result.bytes())
                    self._came(len(data), length, key)
                    return data
            except ImageError as error:
                if error.errno not in _AGAIN or not left:
                    raise
        raise AssertionError

    def has_part(self, name: str, length: int) -> bool:
        """Whether the part is there, as long as it should be."""
        key = part_key(name)
        try:
            with self._explained(key):
                with self._lock:
                    self.asked += 1
                return bool(self._library.head(self._store, key)["size"] == length)
        except ImageError as error:
            if error.errno == errno.ENOENT:
                return False
            raise

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object: all of it is there then, or what was there before."""
        with self._explained(key):
            with self._lock:
                self.asked += 1
            self._library.put(self._store, key, bytes(data), use_multipart=False)


def part_key(name: str) -> str:
    """Where the part is that is called so."""
    return f"{PARTS}/{name[:2]}/{name}"


def _check(found: str, name: str, key: str) -> None:
    if found != name:
        raise ImageError(errno.EIO, "its contents are not what it is called", key)


def _version(meta: Any, key: str) -> tuple[int, str]:
    """A tag, or, where a server has none, when it was written."""
    tag = meta.get("e_tag") or ""
    if not tag or tag.startswith("W/"):
        when = meta.get("last_modified")
        if when is None or when.timestamp() == 0:
            raise ImageError(errno.EOPNOTSUPP, "the store does not tell versions of it apart", key)
        tag = f"{tag} {when.isoformat()}"
    return int(meta["size"]), str(tag)


def _code_of(error: BaseException) -> int:
    text = str(error).lower()
    if "timed out" in text or "timeout" in text.split("retry_timeout")[0]:
        return errno.ETIMEDOUT
    return errno.EHOSTUNREACH


def _words(error: BaseException) -> str:
    """A store's own words: one line of them, and not all."""
    lines = str(error).strip().split("\n", 1)
    return "".join(char if char.isprintable() else " " for char in lines[0])[:_WORST]
