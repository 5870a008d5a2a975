"""A Ray cluster on machines of its own, joined by a network of its own.

Each has a network, a mount and a pid namespace, its own /dev/shm and its own msharefsd.  Whatever
runs in one ends with its first process, and that with us, so a test run that is killed leaves
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ALIGNMENT, BIN, Daemon, alive, eventually
from objectstores import Bad, serving

NETWORK = "10.99.0"
SWITCH = 254
"""The number of the one that has the bridge and the object store."""
PORT = 6379
TRIES = 3
"""How often a node is started: Ray gives itself 30 seconds, and a busy machine may not."""
_libc = ctypes.CDLL(None, use_errno=True)
_KINDS = ("--net", "--mount", "--pid")
_IDLE = "sleep infinity & wait"  # and not exec: orphans are waited for


class Namespaces:
    """Where processes run that see nothing of ours but files."""

    def __init__(self, begin: str = "true") -> None:
        words = [*_KINDS, "--mount-proc", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            ["unshare", *words, "sh", "-c", f"{begin} && echo && {_IDLE}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=_end_with_us,  # noqa: PLW1509 - one system call
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"\n"
        outside = self._process.pid
        self.pid = int(Path(f"/proc/{outside}/task/{outside}/children").read_text())

    def words(self, *words: object) -> list[str]:
        """A command that runs there."""
        return ["nsenter", f"--target={self.pid}", *_KINDS, *map(str, words)]

    def end(self) -> None:
        """All that runs there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        eventually(lambda: not alive(self.pid), "the end of a machine")


def _end_with_us() -> None:
    """In the child."""
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


class Switch:
    """What joins the machines: a bridge, and an object store that they all reach."""

    def __init__(self, images: Path) -> None:
        self.namespaces = Namespaces()
        for each in (
            # (Without an address of its own it has that of a machine, until that one goes.)
            "link add br0 address 02:00:00:00:00:fe type bridge",
            f"address add {NETWORK}.{SWITCH}/24 dev br0",
            "link set br0 up",
        ):
            self.run(f"ip {each}")
        made: list[Bad] = []

        def listen() -> None:
            # A thread has a network of its own, and a socket stays in the one it was made in.
            with open(f"/proc/{self.namespaces.pid}/ns/net") as file:
                assert _libc.setns(file.fileno(), 0) == 0
            made.append(Bad(images, f"{NETWORK}.{SWITCH}"))

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        (self.store,) = made

    def run(self, words: str) -> None:
        # (Only its network: a pid in the words is as we see it.)
        target = f"--target={self.namespaces.pid}"
        subprocess.run(["nsenter", target, "--net", *words.split()], check=True)

    def fetched(self) -> list[int]:
        """The bytes of each part that was asked for since the last time."""
        asked, self.store.requests = self.store.requests, []
        directory = self.store.directory
        return [(directory / each[1:]).stat().st_size for each in asked if "/parts/" in each]


class Machine:
    """One of them."""

    def __init__(self, number: int, directory: Path) -> None:
        own = "mount --make-rprivate / && mount -t tmpfs -o mode=1777 own /dev/shm"
        self.namespaces = Namespaces(own)
        self.address = f"{NETWORK}.{number}"
        self.directory = directory / str(number)
        self.directory.mkdir()
        self.daemon = Daemon(self.directory, f"--alignment={ALIGNMENT}")
        self._token = directory / "token"
        self.serves = False
        self._running: list[subprocess.Popen[bytes]] = []

    def connect(self, switch: Switch) -> None:
        """Have its network."""
        number = self.address.rpartition(".")[2]
        switch.run(f"ip link add port{number} type veth peer name eth0 netns {self.namespaces.pid}")
        switch.run(f"ip link set port{number} master br0 up")
        for each in (
            "link set lo up",
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {NETWORK}.{SWITCH}",
        ):
            self.run("ip", *each.split())

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONSAFEPATH": "1",
            "MSHARE_ROOT": str(self.daemon.mount),
            "XDG_CONFIG_HOME": str(self.directory.parent / "config"),
            "RAY_AUTH_MODE": "token",  # (else `ray start` makes a token in the home directory)
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_ADDRESS": f"{NETWORK}.1:{PORT}",
            "RAY_health_check_period_ms": "500",  # who does not answer has its 10 seconds still
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # it kills who is there when tests use much
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def start(self, *words: object) -> subprocess.Popen[str]:
        """A program there, which is written to and read from."""
        return subprocess.Popen(
            self.namespaces.words(*words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=self.environment,
        )

    def run(self, *words: object) -> str:
        """What a program there says."""
        process = self.start(*words)
        try:
            output, errors = process.communicate(timeout=200)
        finally:
            process.kill()
        assert process.returncode == 0, output + errors
        return output

    def python(self, program: str) -> Any:
        """What a program there prints, as its last line, in JSON."""
        return json.loads(self.run(sys.executable, "-c", program).splitlines()[-1])

    def _begin(self, log: Path, *words: object) -> subprocess.Popen[bytes]:
        """A program that ends with the machine."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.namespaces.words(*words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=self.environment,
            )
        self._running.append(process)
        return process

    def serve(self) -> None:
        """Start its daemon."""
        self.serves = True
        self._begin(self.daemon.log_file, *self.daemon.command())
        eventually(lambda: "ready:" in self.daemon.log(), "a daemon")

    def join(self) -> None:
        """Become a node of the cluster; the first one makes it."""
        head = self.address.endswith(".1")
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        log = self.directory / "ray"
        words = [
            *(BIN / "ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats"),
            *(role if head else [f"--address={NETWORK}.1:{PORT}"]),
            f"--node-ip-address={self.address}",
            "--object-store-memory=80000000",
            f"--temp-dir={self.directory}/r",
        ]
        for _ in range(TRIES):
            process = self._begin(log, *words)
            eventually(
                lambda: process.poll() is not None or "runtime started" in log.read_text(),  # noqa: B023
                "a node",
                90,
            )
            if process.poll() is None:
                return
            self.run(BIN / "ray", "stop", "--force")
        pytest.fail(log.read_text())

    def regions(self) -> list[str]:
        """The names of its regions."""
        return self.run("ls", self.daemon.mount / ".regions").split()

    def memory(self) -> list[str]:
        """What of regions is in its /dev/shm."""
        return [each for each in self.run("ls", "/dev/shm").split() if "msharefs" in each]

    def clear(self) -> None:
        """Remove its regions, and see that nothing is left."""
        for each in self.regions() if self.serves else []:
            self.run("unlink", self.daemon.mount / each)
        eventually(lambda: self.memory() == [], "no memory is left")

    def end(self) -> None:
        """Switch it off: first what runs there, while it has a network, so that others see it."""
        with contextlib.suppress(AssertionError):  # nsenter is one of them
            self.run("kill", "-9", "-1")
        self.namespaces.end()
        for each in self._running:
            each.wait()


class Cluster:
    """Machines; those that are added join."""

    def __init__(self, directory: Path, held: contextlib.ExitStack) -> None:
        self.directory = directory
        (directory / "images").mkdir()
        (directory / "token").write_text(secrets.token_hex(32))
        (directory / "token").chmod(0o600)
        self._held = held
        self.switch = Switch(directory / "images")
        held.callback(self.switch.namespaces.end)
        held.enter_context(self.switch.store)
        held.enter_context(serving(self.switch.store))
        self.machines: list[Machine] = []
        sources = directory / "config" / "msharefs" / "sources.toml"
        sources.parent.mkdir(parents=True)
        sources.touch(0o600)
        sources.write_text(
            '[[source]]\nprefix = "s3://"\nregion = "any"\n'
            f'endpoint = "{self.switch.store.url}"\n'
            'access_key_id = "any"\nsecret_access_key = "any"\n'
        )

    def add(self, *, serves: bool = True) -> Machine:
        made = Machine(len(self.machines) + 1, self.directory)
        self._held.callback(made.end)
        made.connect(self.switch)
        self.machines.append(made)
        if serves:
            made.serve()
        made.join()
        return made


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """One of two machines."""
    with contextlib.ExitStack() as held:
        made = Cluster(directory, held)
        made.add()
        made.add()
        yield made
        for each in made.machines:
            each.daemon.check_log()
