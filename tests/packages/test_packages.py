"""The Debian packages: built, installed under a systemd, used, upgraded, removed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from building import DEBOOTSTRAP, PROJECT, Debian, later, script
from conftest import Client
from machine import LackingError, Service, started
from pages import DOCS, Shell

pytestmark = [pytest.mark.shm_only, pytest.mark.timeout(3600 if DEBOOTSTRAP else 1200)]

NAMES = ("libmshare0", "libmshare-dev", "python3-libmshare", "msharefs")
MOUNT = "/sys/fs/mshare"
SHARER = """
#include <errno.h>
#include <mshare.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
	struct mshare_info info;

	if (argc == 2 && mshare_attach(argv[1], O_RDWR, &info) == 0)
		return 0;
	fprintf(stderr, "%s: %s\\n", strerror(errno), mshare_reason());
	return 1;
}
"""
READER = """
import sys, urllib.request
address = sys.stdin.readline().strip()
for path in ("", "page.js", "api/state"):
    with urllib.request.urlopen(address + path) as answer:
        assert answer.status == 200 and answer.read(), path
"""
"""Who opens the page of `mshare web`."""
HOLDER = """
import sys
from libmshare import Region
region = Region.attach("numbers")
for line in sys.stdin:
    print(eval(line), flush=True)
"""
"""A sharer that does as it is told, about `region`."""


@pytest.fixture(scope="module")
def packages() -> dict[str, Path]:
    """What `make deb` builds, by name; lintian has looked at it."""
    paths = [PROJECT / line for line in script("deb").splitlines()]
    found = {path.name.split("_")[0]: path for path in paths}
    assert set(NAMES) <= set(found)
    return {name: found[name] for name in NAMES}


@pytest.fixture
def debian(packages: dict[str, Path]) -> Iterator[Debian]:
    directory = Path(tempfile.mkdtemp(prefix="mshare-test-"))
    try:
        with started(Debian(directory)) as made:
            yield made
    except LackingError as lacking:
        pytest.skip(f"no systemd as PID 1 can be had here, for want of {lacking}")
    finally:
        shutil.rmtree(directory)


def python(debian: Debian) -> Client:
    return debian.client(None, ("/usr/bin/python3", "-c", HOLDER))


def end(sharer: Client) -> None:
    assert sharer.process.stdin is not None
    sharer.process.stdin.close()
    assert sharer.process.wait(20) == 0


def install(debian: Debian, files: list[Path]) -> None:
    given = [debian.give(file, file.name) for file in files]
    debian.manage("dpkg", "--force-unsafe-io", "--install", *given)


def test_from_installing_to_purging(
    debian: Debian, packages: dict[str, Path], tmp_path: Path
) -> None:
    before, mounts = debian.files(), debian.mounts()
    service = Service(debian)
    install(debian, list(packages.values()))

    check_that_it_waits(debian, service)
    service.systemctl("enable")
    service.systemctl("start")
    first = service.pid
    assert debian.run("cat", f"{MOUNT}/mshare_info").stdout == f"{512 << 30}\n"

    collapser = Service(debian, "mshare-collapse.service")
    collapser.systemctl("start")

    # From the shell, from Python and from C.
    debian.run("mshare", "create", "numbers", "--size", "64M", "--anonymous")
    assert "numbers" in debian.run("mshare", "ls").stdout
    holder = python(debian)
    assert holder.do("region.buf[:3].hex()") == "000000"
    assert holder.do("region.buf.__setitem__(0, 7)") == "None"
    source = debian.give(PROJECT / "examples/counter.c", "counter.c")
    build = f"cc -o /srv/counter {source} $(pkg-config --cflags --libs libmshare)"
    debian.run("sh", "-c", build)
    assert debian.run("/srv/counter").stdout.startswith("run 1 ")
    assert debian.run("mshare", "info", "numbers").stdout
    assert debian.run("mshare", "run", "--no-watch", "--", "true").stderr == ""

    check_mistakes(debian)
    check_page(debian)
    check_help(debian)

    # An upgrade keeps everything, and whoever has it.
    install(debian, [later(file, tmp_path) for file in packages.values()])
    assert service.show("ActiveState") == "active"
    assert service.pid != first
    assert collapser.show("ActiveState") == "active"
    assert holder.do("region.buf[0]") == "7"
    assert holder.do("region.buf[32 << 20]") == "0"  # a page that was never touched
    other = python(debian)
    assert other.do("region.buf[0]") == "7"
    assert debian.run("/srv/counter").stdout.startswith("run 2 ")

    # What is in use is not removed; then it is.
    refused = debian.manage("dpkg", "--remove", "msharefs", check=False)
    assert refused.returncode != 0
    assert "in use: " in refused.stderr
    assert "--purge --force" in refused.stderr
    assert service.show("ActiveState") == "active"
    assert holder.do("region.buf[40 << 20]") == "0"
    for each in (holder, other):
        end(each)
    debian.manage("dpkg", "--remove", "msharefs")
    assert debian.run("ls", "/etc/msharefs.toml", "/etc/default/msharefsd").stdout
    assert debian.mounts() == mounts
    debian.manage("dpkg", "--purge", *NAMES)
    assert debian.files() == before
    assert debian.run("find", "/dev/shm", "/run", "-name", "*mshare*").stdout == ""
    left = debian.run("ps", "-eo", "args").stdout
    assert "mshare" not in left


def test_the_first_steps(debian: Debian, packages: dict[str, Path]) -> None:
    """docs/tutorial.md, as it stands there, from the packages in dist/ to nothing."""
    before = debian.files()
    dist = Path("srv/steps/dist")
    (debian.root / dist).mkdir(parents=True)
    for package in packages.values():
        shutil.copy(package, debian.root / dist / package.name)
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    user = debian.client(None, ("/bin/bash",), **environment)
    shell = Shell(user.process)
    status, said = shell.run(f"cd /{dist.parent}")
    assert (status, said) == (0, "")
    assert shell.follow(DOCS / "tutorial.md", debian.root / dist.parent) > 15
    shell.close()
    # logind makes that one when it comes to it.
    assert debian.files() - {"/var/lib/systemd/linger"} == before


def check_that_it_waits(debian: Debian, service: Service) -> None:
    """For being told."""
    assert service.show("ActiveState") == "inactive"
    assert service.show("UnitFileState") == "disabled"
    assert "0.1.0" in debian.run("mshare", "--version").stdout
    for words in (("ls",), ("status",), ("top", "--once"), ("create", "x", "--size", "2M")):
        said(debian, "msharefs is not mounted; start msharefsd", "mshare", *words)


def said(debian: Debian, sentence: str, *words: object, user: int | None = None) -> None:
    """A command fails, and says so in one line."""
    done = debian.run(*words, user=user, check=False)
    assert done.returncode != 0, words
    assert done.stdout == "", words
    assert done.stderr.count("\n") == 1, (words, done.stderr)
    assert sentence in done.stderr, words


def check_mistakes(debian: Debian) -> None:
    """What goes wrong in the first hour, in the shell and in C."""
    nobody = 65534
    denied = "permission denied; its mode says who may"
    missing = "no such region; `mshare ls` lists them"
    create = ("mshare", "create", "x", "--size")
    said(debian, "numbers: it exists; choose another name", *create[:2], "numbers", "--size=2M")
    said(debian, "--size must be a multiple of 512G", *create, "2M", "--start=2T")
    said(debian, "10X: write 4096, 64M, 512G", *create, "10X")
    said(debian, "a region's name has no slash", *create[:2], "a/b", "--size=2M")
    said(debian, "no range of so many addresses is left", *create, "100T")
    said(debian, f"nothing: {missing}", "mshare", "info", "nothing")
    said(debian, "no such command 'creat'. Did you mean 'create'?", "mshare", "creat")
    said(debian, f"numbers: {denied}", "mshare", "maps", "numbers", user=nobody)
    said(debian, "only its owner and root may remove", "mshare", "rm", "numbers", user=nobody)
    where = "/usr/local/lib/python3.11/dist-packages"
    said(debian, f"install --target {where} obstore", "mshare", "pull", "file:///none")
    source = debian.packages / "sharer.c"
    debian.write(str(source), SHARER)
    build = f"cc -o /srv/sharer {source} $(pkg-config --cflags --libs libmshare)"
    debian.run("sh", "-c", build)
    said(debian, f": {missing}", "/srv/sharer", "nothing")
    said(debian, f": {denied}", "/srv/sharer", "numbers", user=nobody)
    debian.run("chmod", "666", f"{MOUNT}/numbers")
    assert debian.run("/srv/sharer", "numbers", user=nobody).stderr == ""
    said(debian, "msharefs is not mounted", "env", "MSHARE_ROOT=/srv", "/srv/sharer", "numbers")


def check_page(debian: Debian) -> None:
    """By Debian's own Starlette and uvicorn; without them, what to install."""
    web = debian.client(None, ("sh", "-c", "echo $$; exec mshare web"))
    pid = web.result()
    reader = debian.client(None, ("/usr/bin/python3", "-c", READER))
    reader.send(web.result())
    assert reader.process.wait(60) == 0
    debian.run("kill", "-INT", pid)
    web.process.wait(60)
    starlette, away = "/usr/lib/python3/dist-packages/starlette", "/srv/starlette"
    debian.run("mv", starlette, away)
    cure = "the page needs starlette: apt install --no-install-recommends python3-starlette"
    said(debian, cure, "mshare", "web")
    debian.run("mv", away, starlette)


def check_help(debian: Debian) -> None:
    """Pages, and what the shell completes."""
    for page in ("mshare", "msharefsd", "mshare_attach", "mshare_reason"):
        assert debian.run("man", "--where", page).stdout
    evil = "x;id>evil 1"
    debian.run("mshare", "create", evil, "--size", "2M")
    complete = """
        . /usr/share/bash-completion/completions/mshare
        COMP_WORDS=(mshare rm "$1") COMP_CWORD=2
        _mshare mshare
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    for begun, whole in (("nu", "numbers"), ("x", r"x\;id\>evil\ 1")):
        assert debian.run("bash", "-c", complete, "bash", begun).stdout == f"{whole}\n"
    debian.run("mshare", "rm", evil)
