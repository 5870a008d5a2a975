"""Region images on a Ray cluster: a holder on each node, and regions as arguments of tasks.

Ray moves the work, the object store the bytes (images/), and each node's own daemon has the
region.  Nothing here runs in a daemon, or keeps anything in Ray's object store: what a task is
sent says which image it is, and becomes the region where it arrives.

`ray` is imported when it is needed: who does not use it need not have it.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import sys
import time
from collections.abc import Iterable
from types import ModuleType, TracebackType
from typing import Any, Final, NamedTuple, Self, cast

from libmshare import region as regions
from libmshare.errors import Busy, MshareError, NoMemory, NoSuchRegion, Stale
from libmshare.images.pull import described, name_of
from libmshare.images.unnamed import check_name
from libmshare.region import Identity, Region

_Which = tuple[Identity, str, bool]
"""What a region is pickled as, on one machine."""
_TIDY: Final = 30.0
"""How long the end waits for nodes to remove names (seconds): one may be dying."""


class _Image(NamedTuple):
    """What travels."""

    url: str
    name: str
    backing: str | None
    digest: str
    abi: str | None
    mode: int
    kept: bool
    """Whether regions have their name; else what `held` says is the way to them."""
    held: dict[str, _Which]
    """By a node's ID."""

    def pull(self) -> Region:
        """The one of this machine; fetched, if it is not here."""
        return Region.pull(
            self.url,
            self.name,
            backing=self.backing,
            digest=self.digest,
            abi=self.abi,
            mode=self.mode,
        )


class _Pulled(Region):
    """A region that may be sent on to other nodes: it travels as its image."""

    _image: _Image

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _arrived, (self._image, self._which())


class _Sent:
    """What becomes the region where it is unpickled."""

    def __init__(self, image: _Image) -> None:
        self._image = image

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _arrived, (self._image, None)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"no {name!r} here: this becomes the region in the task that it is sent to"
        )


def _arrived(image: _Image, which: _Which | None) -> Region:
    """The image's region, for pickle.  Raises as Region.pull()."""
    which = which or image.held.get(_node())
    region = None
    if which is not None:
        # (If it is gone, or another node's, it is fetched here.)
        with contextlib.suppress(Stale, NoSuchRegion):
            region = regions.unpickle(*which)
    if region is None:
        region = image.pull()
    made = _Pulled._of(region._hold, region._opened(), readonly=region.readonly)  # noqa: SLF001
    made._name, made._image = region.name, image  # noqa: SLF001 - ours
    region.close()
    return made


def _node() -> str:
    """The ID of the node that this process is a worker of."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    return str(ray.get_runtime_context().get_node_id())


class _Holder:
    """The actor of a node.  It ends with who called everywhere(), and lets go then."""

    def __init__(self) -> None:
        self._region: Region | None = None

    def pull(self, image: _Image) -> _Which:
        self._region = region = image.pull()
        which = Region.__reduce__(region)[1]
        if not image.kept:
            region.unlink()
        return cast("_Which", which)


def _forget(image: _Image) -> None:
    """Take the name away that this image has here: tasks have pulled it."""
    with contextlib.suppress(NoSuchRegion), Region.attach(image.name) as region:
        region.unlink()


class Everywhere:
    """An image on the nodes of a cluster, while this is open; everywhere() makes it.

    Synchronization: its methods are for one thread; what it gives may be sent from any.
    """

    def __init__(self, image: _Image, memory: int, nodes: list[dict[str, Any]]) -> None:
        """Not to be called: everywhere()."""
        self._image = image
        self._addresses = {each["NodeID"]: each["NodeManagerAddress"] for each in nodes}
        holder = _ray().remote(_Holder)
        self._holders = {
            node: holder.options(memory=memory or None, **_on(node)).remote()
            for node in self._addresses
        }

    @property
    def region(self) -> Region:
        """For a task's or an actor's arguments: what arrives is the region, attached.

        Here it is not, and has no contents: Region.pull() attaches it here.
        """
        return cast("Region", _Sent(self._image))

    @property
    def digest(self) -> str:
        """Which image it is, as push() told it."""
        return self._image.digest

    @property
    def nodes(self) -> list[str]:
        """The IDs of the nodes that it was brought to."""
        return list(self._image.held)

    def _fill(self, timeout: float | None) -> None:
        ray = _ray()
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = {each.pull.remote(self._image): node for node, each in self._holders.items()}
        held = {}
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(waiting), timeout=left)
            if not ready:
                where = ", ".join(sorted(self._addresses[node] for node in waiting.values()))
                raise Busy(
                    errno.ETIMEDOUT,
                    f"not filled in {timeout} s: {where}; `ray status` shows what waits for memory",
                    self._image.name,
                )
            node = waiting.pop(ready[0])
            try:
                held[node] = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                if any(each["NodeID"] == node for each in _alive()):
                    raise self._explained(node, error) from error
                # It has died: what would run there does not, either.
        self._image = self._image._replace(held=held)

    def _explained(self, node: str, error: BaseException) -> MshareError:
        """What went wrong there, with what to do as it was said there."""
        cause = getattr(error, "cause", None)
        where = f"on node {self._addresses[node]}"
        if isinstance(cause, MshareError):
            return type(cause)(cause.errno, f"{where}: {cause.strerror}", cause.filename)
        if isinstance(cause, OSError):
            return MshareError(cause.errno, f"{where}: {cause.strerror}", cause.filename)
        return MshareError(errno.EIO, f"{where}: {cause or error}", self._image.name)

    def close(self) -> None:
        """Have the holders end.  Twice is fine."""
        holders, self._holders = self._holders, {}
        ray = _ray()
        if not holders or not ray.is_initialized():
            return
        for each in holders.values():
            ray.kill(each)
        if not self._image.kept:
            forget = ray.remote(_forget)
            doing = [forget.options(**_on(node["NodeID"])).remote(self._image) for node in _alive()]
            ray.wait(doing, num_returns=len(doing), timeout=_TIDY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def everywhere(
    url: str,
    name: str | None = None,
    *,
    backing: str | None = None,
    digest: str | None = None,
    abi: str | None = None,
    mode: int = 0o600,
    keep: bool = True,
    memory: int | None = None,
    nodes: Iterable[str] | None = None,
    timeout: float | None = None,
) -> Everywhere:
    """Have a region of an image on each node of the Ray cluster, for tasks to use.

    A holder on each node, an actor, pulls it and keeps it attached until this is closed; all
    have it when this returns.  Tasks get `region` of what comes back, which is attached where
    they run; on a node that has joined later the first one pulls it.

    `url`, `name`, `backing`, `digest`, `abi`, `mode`: as for Region.pull().
    `keep`: the regions stay under their name, and another job finds them.  If not, they have
    none, and each goes with its last user, however its holder ends.
    `memory`: what Ray is told that a holder takes, in bytes: what the image has, or 0 for
    backing="hugetlb", by default.
    `nodes`: IDs; by default all that have processors for tasks.
    `timeout`: in seconds, until all have it.

    Raises MshareError if there is no Ray, or no such node; NoMemory if the image is more than
    a node has for actors; Busy at the timeout; and as Region.pull(), for the first node where
    that failed.  Then no holder is left.  A node that dies meanwhile is left out.
    """
    ray = _ray()
    if not ray.is_initialized():
        raise MshareError(errno.EINVAL, "this process is in no Ray cluster: call ray.init()")
    called = name_of(url) if name is None else name
    if not keep:
        called = f"{called}-{secrets.token_hex(8)}"
    check_name(called)
    if digest is None or memory is None:
        manifest, digest = described(url, digest, abi)
        if memory is None:
            memory = 0 if backing == "hugetlb" else manifest.stored()
    image = _Image(url, called, backing, digest, abi, mode, keep, {})
    made = Everywhere(image, memory, _chosen(nodes, memory))
    try:
        made._fill(timeout)  # noqa: SLF001 - ours
    except BaseException:
        made.close()
        raise
    return made


def _ray() -> Any:
    try:
        import ray  # noqa: PLC0415 - an extra
        import ray.exceptions  # noqa: PLC0415
    except ImportError as error:
        raise MshareError(
            errno.EOPNOTSUPP, "this needs Ray: pip install 'msharefs[ray]'"
        ) from error
    found: ModuleType = ray
    return found


def _alive() -> list[dict[str, Any]]:
    return [each for each in _ray().nodes() if each["Alive"]]


def _on(node: str) -> dict[str, Any]:
    """Options for what runs on that node or nowhere, and takes no processor."""
    from ray.util.scheduling_strategies import (  # noqa: PLC0415 - an extra
        NodeAffinitySchedulingStrategy,
    )

    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }


def _chosen(wanted: Iterable[str] | None, memory: int) -> list[dict[str, Any]]:
    """The nodes that are to have it.  Raises MshareError, NoMemory."""
    found = {each["NodeID"]: each for each in _alive()}
    if wanted is None:
        ids = [node for node, each in found.items() if each["Resources"].get("CPU")]
    else:
        ids = list(dict.fromkeys(wanted))
    if not ids:
        raise MshareError(errno.EINVAL, "no node of the cluster has processors; say nodes=...")
    for node in ids:
        if node not in found:
            raise MshareError(errno.EINVAL, f"{node} is no living node; ray.nodes() lists NodeIDs")
        has = int(found[node]["Resources"].get("memory", 0))
        if memory > has:
            where = found[node]["NodeManagerAddress"]
            raise NoMemory(
                errno.ENOSPC,
                f"on node {where} Ray has {has} bytes for actors, and the image takes {memory}; "
                "`ray start --memory` says how much, or everywhere(memory=0) asks for none",
            )
    return [found[node] for node in ids]
