"""A PostgreSQL of one's own: Debian's programs, a directory that goes away afterwards.

As root it runs as the user that Debian's package made for it, since it refuses root;
else as whoever starts it.  Nothing listens on a network.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

USER: Final = "postgres"
START_SECONDS: Final = 60.0
SETTINGS: Final = {
    "listen_addresses": "''",
    "fsync": "off",
    "autovacuum": "off",
    "max_parallel_workers_per_gather": "0",
    "max_wal_size": "2GB",
    "huge_pages": "off",
}
"""So that each connection does the same each time, and touches what it is to touch."""
SCAN: Final = "SELECT count(*) FROM {} TABLESAMPLE SYSTEM (10)"
"""A tenth of a table's pages, by the backend itself: 25 in each 2 MiB, on average, so each
backend has all the page tables that it would have for the whole, in a tenth of the time."""


class NoPostgresError(Exception):
    """It is not installed."""


def programs() -> Path:
    """Where the newest PostgreSQL's programs are.  Raises NoPostgresError."""
    found = sorted(
        (each for each in Path("/usr/lib/postgresql").glob("*/bin") if (each / "initdb").exists()),
        key=lambda each: float(each.parent.name),
    )
    if not found:
        raise NoPostgresError("PostgreSQL is not installed: scripts/system-packages does that")
    return found[-1]


def identity() -> dict[str, object]:
    """As whom subprocess is to run it."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(USER)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


class Session:
    """A connection that stays open."""

    def __init__(self, server: Postgres) -> None:
        self._process = subprocess.Popen(
            [*server.command("psql"), "--no-psqlrc", "--quiet", "--tuples-only", "--no-align"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    def begin(self, statements: str) -> None:
        """Send statements; `answer` waits for what they say."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{statements};\n\\echo done\n")
        self._process.stdin.flush()

    def answer(self) -> list[str]:
        """What the statements said, by line.  Raises ConnectionError if the session has ended."""
        assert self._process.stdout is not None
        lines: list[str] = []
        for line in self._process.stdout:
            if line == "done\n":
                return lines
            lines.append(line.rstrip("\n"))
        raise ConnectionError("the session has ended")

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()


class Postgres:
    """One server, and its data."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made, for this alone.  Raises NoPostgresError."""
        self.bin = programs()
        self.directory = directory
        self.data = directory / "data"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir()
        if os.geteuid() == 0:
            shutil.chown(directory, USER)
        self._run(
            "initdb", "--pgdata", self.data, "--auth=trust", f"--username={USER}", "--no-sync",
            "--data-checksums",
        )  # fmt: skip

    def _run(self, program: str, *arguments: object, check: bool = True) -> str:
        done = subprocess.run(
            [str(self.bin / program), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd="/",
            env=self._environment(),
            **identity(),  # type: ignore[call-overload] # who runs it
        )
        if check and done.returncode:
            raise RuntimeError(f"{program} {arguments}: {done.stdout}")
        return str(done.stdout)

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self.directory)}

    def start(
        self,
        settings: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it and wait until it answers.

        `wrapper` is a command that starts it, with our own rights: the server gives those up.
        """
        who = identity()
        if wrapper and who:
            become = [f"--re{key[0]}id={who[key]}" for key in ("user", "group")]
            wrapper, who = [*wrapper, "setpriv", *become, "--clear-groups"], {}
        options = dict(SETTINGS) | {"unix_socket_directories": f"'{self.directory}'"}
        (self.data / "postgresql.auto.conf").write_text(
            "".join(f"{key} = {value}\n" for key, value in (options | dict(settings or {})).items())
        )
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*wrapper, str(self.bin / "postgres"), "-D", str(self.data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._environment() | dict(environment or {}),
                **who,  # type: ignore[call-overload] # who runs it
            )
        self.wait_until_ready()

    def ask(self, setting: str) -> str:
        """A setting of the server, which is stopped."""
        return self._run("postgres", "-D", self.data, "-C", setting).strip()

    def wait_until_ready(self) -> None:
        """Until it takes connections.  Raises RuntimeError if it ends instead."""
        deadline = time.monotonic() + START_SECONDS
        while "accepting" not in self._run(
            "pg_isready", f"--host={self.directory}", check=False
        ).replace("rejecting", ""):
            if (self.process and self.process.poll() is not None) or time.monotonic() > deadline:
                raise RuntimeError(f"it does not start: {self.log()}")
            time.sleep(0.05)

    def log(self) -> str:
        """What it has said."""
        return (self.directory / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])

    def processes(self) -> list[int]:
        """All of it: the postmaster and its children."""
        pid = self.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def command(self, program: str) -> list[str]:
        """A client of it."""
        return [str(self.bin / program), f"--host={self.directory}", f"--username={USER}"]

    def sql(self, statements: str) -> str:
        """What statements say.  Raises RuntimeError."""
        return self._run(
            "psql", f"--host={self.directory}", f"--username={USER}", "--no-psqlrc", "--quiet",
            "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", f"--command={statements}",
        ).strip()  # fmt: skip

    def load(self, scale: int) -> None:
        """Pgbench's tables, 16 MB for each of `scale`, all of them in the shared buffers."""
        self.pgbench("--initialize", f"--scale={scale}", "--quiet")
        self.sql("CREATE EXTENSION IF NOT EXISTS pg_prewarm")
        self.prewarm()

    def prewarm(self) -> None:
        """Have the tables in the shared buffers, by one process."""
        self.sql("SELECT pg_prewarm('pgbench_accounts'), pg_prewarm('pgbench_accounts_pkey')")

    def pgbench(self, *arguments: str) -> str:
        """Run pgbench; what it says."""
        return self._run("pgbench", f"--host={self.directory}", f"--username={USER}", *arguments)

    @contextlib.contextmanager
    def sessions(self, count: int, table: str = "pgbench_accounts") -> Iterator[list[Session]]:
        """So many connections that have read of a table, see SCAN, open until the end."""
        opened = [Session(self) for _ in range(count)]
        try:
            for session in opened:  # one after the other: there are few processors
                session.begin(SCAN.format(table))
                session.answer()
            yield opened
        finally:
            for session in opened:
                session.close()

    def check(self, *, sums: bool = True) -> None:
        """Whether all is as it must be.  Raises RuntimeError.  Takes a server that runs."""
        self.sql("CREATE EXTENSION IF NOT EXISTS amcheck")
        self._run(
            "pg_amcheck", f"--host={self.directory}", f"--username={USER}", "--heapallindexed",
            "postgres",
        )  # fmt: skip
        if sums:
            said = self.sql(
                "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(delta) FROM "
                "pgbench_history), (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT "
                "sum(bbalance) FROM pgbench_branches)"
            )
            if len({each or "0" for each in said.split("|")}) != 1:
                raise RuntimeError(f"the sums differ: {said}")

    def check_sums(self) -> None:
        """Whether all pages on disk have the right sums.  Raises RuntimeError.

        Takes a server that has been stopped.
        """
        self._run("pg_checksums", "--check", "--pgdata", self.data)

    def stop(self, how: int = signal.SIGINT) -> None:
        """End it: SIGINT fast, SIGQUIT immediately, SIGKILL the postmaster alone."""
        if self.process is None:
            return
        children: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            children = [f"/proc/{pid}" for pid in self.processes()[1:]]
            os.kill(self.pid, how)
        try:
            self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        # Its children notice that it is gone; as long as they have the memory no other starts.
        deadline = time.monotonic() + START_SECONDS
        while any(map(os.path.exists, children)) and time.monotonic() < deadline:
            time.sleep(0.05)

    def remove(self) -> None:
        """End it and remove its data."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)
