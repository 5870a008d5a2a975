"""`mshare web`: who may see the page, what it is sent, and what a browser makes of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from command import MSHARE, SIZE, Command, as_nobody, donate, environment, make
from command import mshare_fixture as _mshare  # noqa: F401 - what tests ask for
from conftest import ALIGNMENT, BASE, Client, Daemon, eventually
from pages import DOCS, blocks
from test_cli import mute_mount_fixture as _mute_mount  # noqa: F401 - the same
from test_cli import stopped

from libmshare.cli.web.page import FILES, POLICY

MARKUP = "<img src=x onerror=document.title=1>&amp;'\"<script>document.title=2<"
"""A name that would do something if it were taken for HTML; one has no slash."""
RAW = b"\xff\xfe-raw"


class Page:
    """`mshare web` for one mount."""

    def __init__(self, root: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [MSHARE, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=environment(root),
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 45)[0], "no address"
        self.address = self.process.stdout.readline().removesuffix("\n")
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{32})/", self.address)
        assert found, (self.address, self.process.poll())
        self.port, self.token = int(found[1]), found[2]

    def ask(
        self, path: str | None = None, method: str = "GET", **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """`path` is below the token; it is one from the root if it begins with a slash."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=45)
        with contextlib.closing(connection):
            whole = path if path is not None and path[:1] == "/" else f"/{self.token}/{path or ''}"
            connection.putrequest(method, whole, skip_host="Host" in headers)
            for key, value in headers.items():
                for each in value.split("|"):
                    connection.putheader(key, each)
            connection.endheaders()
            response = connection.getresponse()
            return response, response.read()

    def status(self, path: str | None = None, method: str = "GET", **headers: str) -> int:
        return self.ask(path, method, **headers)[0].status

    def json(self, path: str) -> Any:
        response, body = self.ask(path)
        assert (response.status, body.isascii()) == (200, True), body
        assert response.headers["content-type"] == "application/json"
        return json.loads(body)

    def last(self) -> Any:
        """The last look, as soon as there is one."""
        eventually(lambda: self.json("api/state")["last"] is not None, "a look")
        return self.json("api/state")["last"]

    def end(self, number: int = signal.SIGINT) -> int:
        """As Ctrl-C does."""
        self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=45)
        assert complaints == ""
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(name="serve")
def serve_fixture() -> Iterator[Callable[..., Page]]:
    started: list[Page] = []

    def start(root: Path, *words: str) -> Page:
        started.append(Page(root, *words))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture(name="page")
def page_fixture(daemon: Daemon, serve: Callable[..., Page]) -> Page:
    return serve(daemon.mount, "web", "--interval=0.3")


def rules(response: http.client.HTTPResponse) -> None:
    """What every answer has, refusals too."""
    headers = response.headers
    assert headers["content-security-policy"] == POLICY
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    for absent in ("set-cookie", "server", "access-control-allow-origin", "location"):
        assert absent not in headers, headers[absent]


def test_who_may_see_it(page: Page) -> None:
    for path in ("", *FILES, "api/state"):
        if path != "page.html":
            response, body = page.ask(path)
            assert (response.status, bool(body)) == (200, True), path
            rules(response)
    # Without the token, all of it and nothing else, there is nothing.
    other = page.token[:-1] + ("A" if page.token[-1] != "A" else "B")
    for path in (
        *("/", "/page.js", "/api/state", f"/{other}/", f"/{page.token[:-1]}/", f"/{page.token}"),
        *(f"/{page.token}A/", f"//{page.token}/", f"/?token={page.token}", "/%ff%00/", "/é/x"),
        *(f"/x/../{page.token}/", f"/{page.token.swapcase()}/api/state", "/favicon.ico", "*"),
        f"http://127.0.0.1:{page.port}/{page.token}/",
    ):
        quoted = path.replace("é", "%C3%A9")
        response, body = page.ask(quoted if quoted[0] == "/" else f"/{quoted}")
        assert response.status == 403, path
        assert page.token.encode() not in body
        rules(response)
    assert page.status("nothing") == page.status("api/regions/00/objects") == 404
    assert page.status("api/regions/2e2e/objects") == 404
    assert page.status(f"/{page.token}/../etc/passwd") == 404
    # It is asked for by its own names only: DNS may say that others are this machine, too.
    here = f":{page.port}"
    for host in ("localhost" + here, "LOCALHOST" + here, "127.0.0.1" + here):
        assert page.status("api/state", Host=host) == 200
    for host in (
        *("evil.example" + here, "127.0.0.1", "127.0.0.1.evil.example" + here, "evil.example"),
        *("localhost:1", f"127.0.0.1{here}@evil.example", "[::1]" + here, "0.0.0.0" + here),
    ):
        response, body = page.ask("api/state", Host=host)
        assert response.status == 403, host
        assert b"regions" not in body
        rules(response)
    assert page.status("", Host=f"127.0.0.1{here}|127.0.0.1{here}") in (400, 403)
    # Nobody changes anything here.
    for method in ("POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND"):
        response, _ = page.ask("api/state", method)
        assert (response.status, response.headers["allow"]) == (405, "GET"), method
        rules(response)
    # Nothing but loopback listens, and of that one address.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", page.port), 45).close()
    assert page.end() == 128 + signal.SIGINT


def test_addresses_are_never_the_same(daemon: Daemon, serve: Callable[..., Page]) -> None:
    one = serve(daemon.mount, "web")
    two = serve(daemon.mount, "web")
    assert one.token != two.token
    assert two.status(f"/{one.token}/") == 403
    words = Command(daemon.mount).fails("web", f"--port={one.port}")
    assert f"port {one.port}: Address already in use; --port=0 takes one that is free" in words
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(45) in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert one.process.stdout is not None and one.process.stderr is not None
    assert one.process.stdout.read() + one.process.stderr.read() == ""


def test_the_documents_commands(daemon: Daemon, serve: Callable[..., Page]) -> None:
    """Each is run as it stands there."""
    lines = [
        line
        for block in blocks(DOCS / "web.md")
        if block.language == "sh"
        for line in block.text.splitlines()
    ]
    assert lines[0] == "mshare web" and len(lines) == 2
    for line in lines:
        if port := re.search(r"--port (\d+)", line):
            eventually(lambda at=int(port[1]): is_free(at), line)  # type: ignore[misc]
        page = serve(daemon.mount, *line.split()[1:])
        assert port is None or page.port == int(port[1])
        assert page.last()["regions"] == []


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_it_agrees_with_the_command(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client], page: Page
) -> None:
    donor = donate(spawn, "gone")
    make(mshare, "r", "--start=32T", "--anonymous")
    (daemon.mount / MARKUP).touch()
    Path(os.fsdecode(os.fsencode(daemon.mount) + b"/" + RAW)).touch()
    mshare.run("rm", "gone")
    added = {"id", "label", "saved", "faults_per_second", "populated_per_second", "owner"}

    def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
        return {key: record[key] for key in record if key not in keys}

    def agree() -> bool:
        """A moment at which nothing changed: the daemon may be making huge pages."""
        told = page.last()
        listed = [without(each, "processes") for each in mshare.json("ls", "--all")]
        top = json.loads(mshare.ok("top", "--once", "--json"))
        saved = [(each["name"], each["saved"]) for each in top["regions"]]
        return (
            [sorted(without(each, *added).items(), key=str) for each in told["regions"]]
            == [sorted(each.items(), key=str) for each in listed]
            and sorted((each["name"], each["saved"]) for each in told["regions"]) == sorted(saved)
            and told["memory"] == sum(each["memory"] for each in listed)
            and told["root"] == top["root"]
            and [without(each, "id", "label", "user", "rss") for each in told["processes"]]
            == [without(each, "rss") for each in top["processes"]]
        )

    eventually(agree, "that they agree")
    told = page.last()
    names = {each["name"]: each["removed"] for each in told["regions"]}
    assert names == {MARKUP: False, os.fsdecode(RAW): False, "gone": True, "r": False}
    (process,) = told["processes"]
    assert (process["pid"], process["region"]) == (donor.pid, "gone")
    assert told["daemon"]["pid"] == str(daemon.pid)
    # And each region by itself, one without a name, too.
    ids = {each["name"]: each["id"] for each in told["regions"]}
    maps = page.json(f"api/regions/{ids['r']}/objects")
    assert [{key: each[key] for key in each if key != "label"} for each in maps["maps"]] == (
        mshare.json("maps", "r")
    )
    assert maps["count"] == 1
    assert page.json(f"api/regions/{ids['gone']}/objects")["count"] == 1
    text = page.json(f"api/regions/{ids['gone']}/pagetables")["text"]
    assert re.search(rf"^{donor.pid} +read-write", text, re.MULTILINE)
    # What was before is told once.
    state = page.json("api/state")
    newest = state["points"][-1]["number"]
    assert [each["number"] for each in state["points"]] == list(range(1, newest + 1))
    assert all(each["number"] > newest for each in page.json(f"api/state?after={newest}")["points"])
    for odd in ("x", "-1", "9" * 5000, "%00", "²"):
        assert page.json(f"api/state?after={odd.replace('²', '%C2%B2')}")["points"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_it_shows_what_its_user_may_see(daemon: Daemon, spawn: Callable[..., Client]) -> None:
    _donor = donate(spawn, "private")
    # What an ordinary user's look finds.
    script = (
        "import json, os; from libmshare.cli.web import watching; os.setgroups([]);"
        "os.setgid(65534); os.setuid(65534); now = watching.look(None);"
        "(region,) = now.seen.regions;"
        "print(json.dumps([now.record, watching.objects(region), watching.page_tables(region)]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
        env=environment(daemon.mount),
    )
    record, maps, tables = json.loads(done.stdout)
    assert [each["name"] for each in record["regions"]] == ["private"]
    assert (record["regions"][0]["sharers"], record["processes"]) == (None, [])
    assert (maps["maps"], tables["text"]) == (None, None)
    assert json.loads(as_nobody(daemon.mount, "ls", "--json").stdout)[0]["sharers"] is None


def test_a_daemon_that_does_not_answer(
    mshare: Command, daemon: Daemon, serve: Callable[..., Page]
) -> None:
    make(mshare, "r")
    page = serve(daemon.mount, "--timeout=0.5", "web", "--interval=0.3")
    number = page.last()["regions"][0]["id"]
    with stopped(daemon):
        eventually(lambda: page.json("api/state")["trouble"] is not None, "the trouble")
        state = page.json("api/state")
        assert "no answer from the daemon within 0.5 s" in state["trouble"]
        assert [each["name"] for each in state["last"]["regions"]] == ["r"]  # as it was
        assert page.status() == 200
        response, body = page.ask(f"api/regions/{number}/objects")
        assert (response.status, b"no answer" in body) == (503, True)
        children = Path(f"/proc/{page.process.pid}/task/{page.process.pid}/children")
        for _ in range(6):
            page.ask(f"api/regions/{number}/pagetables")
            assert len(children.read_text().split()) <= 2
    eventually(lambda: page.json("api/state")["trouble"] is None, "an answer")
    eventually(lambda: page.status(f"api/regions/{number}/objects") == 200, "its objects")
    daemon.stop()
    eventually(lambda: page.json("api/state")["trouble"] is not None, "the trouble")
    assert page.end() == 128 + signal.SIGINT


def test_it_ends_while_somebody_waits(
    mshare: Command, daemon: Daemon, serve: Callable[..., Page]
) -> None:
    make(mshare, "r")
    page = serve(daemon.mount, "--timeout=600", "web", "--interval=0.3")
    number = page.last()["regions"][0]["id"]
    with stopped(daemon), socket.create_connection(("127.0.0.1", page.port)) as waiting:
        path = f"/{page.token}/api/regions/{number}/objects"
        waiting.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost:{page.port}\r\n\r\n".encode())
        children = Path(f"/proc/{page.process.pid}/task/{page.process.pid}/children")
        eventually(lambda: len(children.read_text().split()) == 2, "both that wait")
        assert page.end() == 128 + signal.SIGINT


def test_it_ends_while_a_daemon_hangs(mute_mount: Path, serve: Callable[..., Page]) -> None:
    page = serve(mute_mount, "--timeout=600", "web")
    assert page.json("api/state")["last"] is None
    assert page.end() == 128 + signal.SIGINT


def test_what_is_missing_is_said() -> None:
    for missing in ("uvicorn", "starlette"):
        script = (
            f"import sys; sys.modules['{missing}'] = None; sys.argv[1:] = ['web'];"
            "from libmshare.cli.__main__ import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", script],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
        )
        said = f"mshare: the page needs {missing}: pip install 'msharefs[web]'\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


# -- in a browser --


@pytest.fixture
def chromium(directory: Path) -> Iterator[Browser]:
    with browser(directory / "profile") as started:
        yield started


def row(name: str, column: str) -> str:
    return f'#regions tr[data-id="{name.encode().hex()}"] td[data-column="{column}"]'


def test_the_page_lives(
    mshare: Command,
    daemon: Daemon,
    spawn: Callable[..., Client],
    page: Page,
    chromium: Browser,
    tmp_path: Path,
) -> None:
    chromium.resize(1280, 800)
    chromium.open(page.address)
    chromium.shows("#none", "There are no regions.")
    chromium.shows("[data-total=regions]", "0")
    assert chromium.text("#root") == str(daemon.mount)
    make(mshare, "r")
    chromium.shows(row("r", "Memory"), "0")
    chromium.shows(row("r", "Sharers"), "0")
    chromium.click(row("r", "Name") + " a")
    chromium.shows("#name", "r")
    chromium.shows("#nobody", "Nobody has it attached.")
    chromium.shows("#more", "Nothing is mapped in it.")
    # It gets a sharer, an object, and memory.
    sharer = spawn()
    sharer.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    chromium.shows(row("r", "Sharers"), "1")
    chromium.shows("#sharers tbody td", str(sharer.pid))
    sharer.do("mmap", BASE, ALIGNMENT, 3, 0x31)
    chromium.shows('#objects tbody td[data-column="Protection"]', "rw-s")
    assert chromium.count("#map rect") == chromium.count("#map rect.write") == 1
    sharer.ok("fill", BASE, ALIGNMENT, 1)
    chromium.shows(row("r", "Memory"), mshare.ok("ls").splitlines()[1].split()[3])
    sharer.ok("mprotect", BASE, ALIGNMENT // 2, 1)
    eventually(lambda: chromium.count("#map rect.read") == 1, "the protection")
    assert chromium.count("#objects tbody tr") == 2
    chromium.click("#measured summary")
    eventually(lambda: str(sharer.pid) in (chromium.text("#pagetables") or ""), "page tables")
    line = chromium.value("document.querySelector('.line.faults').getAttribute('d')")
    assert line.startswith("M")
    # On a phone there is no scrolling sideways.
    chromium.resize(390, 844)
    assert chromium.value("document.documentElement.scrollWidth") <= 390
    sharer.kill()
    chromium.shows(row("r", "Sharers"), "0")
    assert chromium.complaints() == []  # a region may go between a look and what is asked of it
    mshare.ok("rm", "r")
    chromium.shows("#none", "There are no regions.")
    assert chromium.text("#name") is None
    page.end()
    chromium.shows("#trouble", "mshare web does not answer: it may have ended.")


def test_names_are_text(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client], page: Page, chromium: Browser
) -> None:
    names = [MARKUP.encode(), RAW, "\u202ertl\u0007".encode(), b"javascript:alert(1)"]
    for name in names:
        mshare.ok("create", f"--size={ALIGNMENT}", "--", name)
    chromium.open(page.address)
    eventually(lambda: chromium.count("#regions tbody tr") == len(names), "all")
    printed = {line.split()[0] for line in mshare.ok("ls").splitlines()[1:]}
    for name in names:
        cell = f'#regions tr[data-id="{name.hex()}"] td[data-column="Name"]'
        assert chromium.text(cell) in printed
        chromium.click(cell + " a")
        chromium.shows("#name", chromium.text(cell))
        assert chromium.value("document.links[0].protocol") == "http:"
    assert chromium.count("img, td script, h2 *") == 0
    assert chromium.value("document.title") == "msharefs"
    # Script that got in nevertheless would not run.
    chromium.value("document.body.append(Object.assign(document.createElement('p'), {id: 'p'}))")
    assert "TrustedHTML" in chromium.value(
        "(() => { try { document.getElementById('p').innerHTML = '<b>'; return ''; }"
        " catch (failure) { return failure.message; } })()"
    )
