"""Debian's Ceph as an object store: a monitor, what has the data, in its memory, and a gateway.

`make test-ceph` unpacks it (scripts/ceph).  It runs as nobody, from where it lies, on the loopback
device; and as there is no manager, which would tell others of it, it tells nobody anything.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from conftest import TESTS, temporary
from objectstores import (
    KEY,
    NOBODY,
    READER,
    READER_SECRET,
    S3,
    SECRET,
    as_nobody,
    free_ports,
    program,
    wait_for,
)

UNPACKED = TESTS.parent / "build/ceph/root"
BUCKETS = ("images", "indexes")
"""It has those that somebody made, and no others."""
SECONDS = 60.0
"""How long a command may take."""
CONFIG = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
keyring = {directory}/keyring
log file = {directory}/$name.log
admin socket =
pid file =
run dir = {directory}
crash dir = {directory}
mon data = {directory}/mon
osd data = {directory}/osd
rgw data = {directory}/rgw
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class dir = {libraries}/rados-classes
osd objectstore = memstore
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default pg num = 1
mon allow pool size one = true
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""


class _Cluster:
    def __init__(self, directory: Path, root: int) -> None:
        """`root`: a descriptor of what is unpacked; nobody may not be able to enter where it is."""
        self._directory = directory
        self._root = root
        (libraries,) = [each.parent for each in UNPACKED.glob("usr/lib/*/rados-classes")]
        port, self.gateway = free_ports(2)
        self.monitor = f"v2:127.0.0.1:{port}"
        found = self._place(libraries)
        config = directory / "ceph.conf"
        config.write_text(
            CONFIG.format(
                fsid=uuid.uuid4(),
                directory=directory,
                libraries=found,
                port=port,
                gateway=self.gateway,
            )
        )
        for name in ("mon", "osd", "rgw"):
            (directory / name).mkdir()
        for path in (directory, *directory.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        more = self._place(UNPACKED / "lib" / libraries.name)
        self._environment = {
            "CEPH_CONF": str(config),
            "LD_LIBRARY_PATH": f"{found}:{found}/ceph:{more}",
            "PYTHONPATH": self._place(UNPACKED / "usr/lib/python3/dist-packages"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _place(self, path: Path) -> str:
        """What it is called in a process that has the descriptor."""
        return f"/proc/self/fd/{self._root}/{path.relative_to(UNPACKED)}"

    def _process(
        self, name: str, words: tuple[str, ...], log: Path
    ) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        executable = self._place(UNPACKED / "usr/bin" / name)
        arguments = [name, *words]
        if name == "ceph":  # a program of the system's Python
            arguments = ["python3", executable, *words]
            executable = "/usr/bin/python3"
        return as_nobody(
            arguments, self._directory, log, executable, [self._root], self._environment
        )

    def do(self, name: str, *words: str) -> None:
        """Run one of its commands."""
        log = self._directory / f"{name}.out"
        with self._process(name, words, log) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS)
            assert process.poll() == 0, f"{name}: {log.read_text()}"

    @contextlib.contextmanager
    def daemon(self, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """Have one of its daemons until the end."""
        log = self._directory / f"{name}.out"
        with self._process(name, ("-f", *words), log) as process:
            try:
                yield process
            finally:
                if process.poll() is not None:
                    print(f"{name} has ended ({process.returncode}): {log.read_text()}")

    def make_keys(self) -> None:
        """Whoever is in the cluster knows the others by them."""
        keyring = str(self._directory / "keyring")
        self.do("ceph-authtool", "--create-keyring", keyring)
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        osd = ("--cap", "mon", "allow profile osd", "--cap", "osd", "allow *")
        for name, rights in (("mon.", everything), ("client.admin", everything), ("osd.0", osd)):
            self.do("ceph-authtool", keyring, "--gen-key", "--name", name, *rights)

    def make_users(self) -> None:
        """One who may do everything, and one who may only read."""
        keys = ("--access-key", KEY, "--secret", SECRET)
        self.do("radosgw-admin", "user", "create", "--uid=u", "--display-name=u", *keys)
        keys = ("--access-key", READER, "--secret", READER_SECRET)
        reader = ("--uid=u", "--subuser=u:reader", "--key-type=s3", "--access=read")
        self.do("radosgw-admin", "subuser", "create", *reader, *keys)

    def make_buckets(self, gateway: S3) -> None:
        of = f":s3,provider=Ceph,endpoint='{gateway.endpoint}',env_auth=true:"
        for bucket in BUCKETS:
            subprocess.run(
                [program("rclone"), "--config=", "mkdir", of + bucket],
                check=True,
                timeout=SECONDS,
                env={"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
            )


@contextlib.contextmanager
def ceph() -> Iterator[S3]:
    """Ceph, with one who may do everything and one who may only read."""
    assert UNPACKED.is_dir(), "`make test-ceph` unpacks it"
    with contextlib.ExitStack() as held:
        directory = held.enter_context(temporary())
        root = os.open(UNPACKED, os.O_PATH | os.O_DIRECTORY)
        held.callback(os.close, root)
        cluster = _Cluster(directory, root)
        cluster.make_keys()
        monitor = ("--id", "a", "--public-addr", cluster.monitor)
        cluster.do("ceph-mon", "--mkfs", "--keyring", str(directory / "keyring"), *monitor)
        held.enter_context(cluster.daemon("ceph-mon", *monitor))
        osd = str(uuid.uuid4())
        cluster.do("ceph", "osd", "new", osd)
        cluster.do("ceph-osd", "--mkfs", "--id", "0", "--osd-uuid", osd)
        held.enter_context(cluster.daemon("ceph-osd", "--id", "0"))
        cluster.make_users()
        process = held.enter_context(cluster.daemon("radosgw", "--id", "admin"))
        gateway = wait_for(process, cluster.gateway, directory / "radosgw.out")
        cluster.make_buckets(gateway)
        yield gateway
