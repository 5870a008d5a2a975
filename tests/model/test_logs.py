"""The log's forms: what a line is about, and who may not forge it."""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import donate
from conftest import ALIGNMENT, Daemon, clients

from msharefsd.telemetry import logs

PACKAGE = Path(logs.__file__).resolve().parents[1]


def record(text: str, *arguments: object, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("x", level, "f.py", 7, text, arguments, None)


@pytest.mark.parametrize(
    ("text", "arguments", "found"),
    [
        ("region %s: a fault of process %d: %s", ("r", 12, "why"), {"region": "r", "pid": 12}),
        ("pager of user %d, process %d, is slow (%s)", (1, 2, "x"), {"uid": 1, "pid": 2}),
        ("%s: user %d", ("region forged: process 7", 5), {"uid": 5}),
        ("%d%% of region %s", (5, "r"), {"region": "r"}),
        ("sharer %d: %s", (7, "x"), {"pid": 7}),
        ("region %s and region %s", ("a", "b"), {"region": "a"}),
        ("region r: nothing", (), {}),
        ("%5.1f of user %d", (1.5, 3), {"uid": 3}),
        ("%s", ("region evil",), {}),
    ],
)
def test_what_a_line_is_about(text: str, arguments: tuple[object, ...], found: Any) -> None:
    assert logs.fields(record(text, *arguments)) == found


def test_our_own_lines_have_fields() -> None:
    texts = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    lines = re.findall(r'log\.\w+\(\s*"([^"]*)"', texts)
    about = [line for line in lines if re.search(r"(region|user|process|sharer) %", line)]
    assert len(about) > 10
    for line in about:
        assert logs.fields(record(line, *range(9)))


def told(sock: socket.socket) -> dict[str, str]:
    data, found = sock.recv(1 << 16), {}
    while data:
        key, _, rest = data.partition(b"\n")
        (size,) = struct.unpack_from("<Q", rest)
        found[key.decode()] = rest[8 : 8 + size].decode("utf-8", "surrogateescape")
        assert rest[8 + size : 9 + size] == b"\n"
        data = rest[9 + size :]
    return found


def test_journald_has_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "socket")
    with pytest.raises(OSError, match="No such file"):
        logs.Journal(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        handler = logs.Journal(path)
        assert sock.recv(10) == b""
        handler.handle(record("region %s: of user %d\nPRIORITY=0", "a\nMSHAREFS_UID=0\udcff", 7))
        found = told(sock)
        assert found["MSHAREFS_REGION"] == "a\nMSHAREFS_UID=0\udcff"
        assert (found["MSHAREFS_UID"], found["PRIORITY"]) == ("7", "4")
        assert found["MESSAGE"].endswith("\nPRIORITY=0")
        assert found["SYSLOG_IDENTIFIER"] == "msharefsd"
        sock.setblocking(False)
        for number in range(10_000):  # nobody reads: it does not wait
            handler.handle(record("line %d", number, level=logging.ERROR))
            if "line" in capsys.readouterr().err:
                break
        else:
            pytest.fail("nothing went to standard error")


def test_a_daemon_that_logs_json(make_daemon: Callable[..., Daemon], client_program: Path) -> None:
    settings = "--log-format=json", "--log-level=debug"
    daemon = make_daemon(f"--alignment={ALIGNMENT}", *settings).start()
    with clients(client_program, daemon) as spawn:
        donate(spawn, "r")
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    (ready,) = [line for line in lines if line["message"].startswith("ready: ")]
    assert (ready["level"], ready["process"]) == ("info", daemon.pid)
    told = [line for line in lines if line["process"] == daemon.pager()]
    assert told and all(line["uid"] == 0 for line in told)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", ready["time"])


def test_json_has_fields() -> None:
    line = logs._Json(7).format(record("region %s: %s", "r\n", "why"))
    assert "\n" not in line
    told = json.loads(line)
    assert (told["region"], told["uid"]) == ("r\n", 7)
    assert json.loads(logs._Json(7).format(record("user %d: %s", 8, "x")))["uid"] == 8
