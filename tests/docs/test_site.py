"""`make docs`, the manual pages, and what pages say of settings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Daemon, compile_c
from pages import DOCS, PROJECT, blocks, functions

import libmshare
from libmshare.cli import collapsing
from msharefsd import config

pytestmark = pytest.mark.shm_only

MANUAL = sorted(path for path in DOCS.iterdir() if re.fullmatch(r"\.[1-9]", path.suffix))


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    site = tmp_path / "site"
    # As the Makefile has it.
    words = ["--quiet", "--fail-on-warning", "--keep-going", "--builder", "html"]
    assert " ".join(words) in (PROJECT / "Makefile").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words, str(DOCS), str(site)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in site.glob("*.html")}
    # Each manual page is there as a whole, with links to the others.
    for name, words in {
        "c": ["mshare_forget_name", "EOWNERDEAD", "MSHARE_EPHEMERAL", 'href="daemon.html"'],
        "command": ["--min-filled", 'href="c.html"'],
        "daemon": ["--run-directory", "names.sqlite"],
    }.items():
        text = (site / f"{name}.html").read_text().replace("&#x2010;", "-")
        for word in words:
            assert word in text, (name, word)
    # And Python's docstrings.
    assert "populate" in (site / "python-api.html").read_text()


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_a_manual_page_is_clean(page: Path) -> None:
    for words in (
        ["mandoc", "-T", "lint", "-W", "warning", str(page)],
        ["groff", "-man", "-Tutf8", "-ww", "-z", str(page)],
    ):
        if shutil.which(words[0]) is None:
            pytest.skip(f"no {words[0]} here")
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_example_of_the_calls_counts(daemon: Daemon, tmp_path: Path) -> None:
    page = (DOCS / "mshare.3").read_text().partition(".SH EXAMPLES")[2]
    shown, compiled, *_ = re.findall(r"^\.RS\n(.*?)^\.RE", page, re.DOTALL | re.MULTILINE)
    source = tmp_path / "ticket.c"
    source.write_text(shown.replace(r"\e", "\\"))
    assert compiled.replace("\\-", "-").startswith(f"cc -o ticket {source.name} ")
    ticket = compile_c(source, tmp_path / "ticket", "-Wall", "-Wextra", "-Werror")
    environment = {"MSHARE_ROOT": str(daemon.mount)}
    for number in range(3):
        done = subprocess.run([ticket], capture_output=True, check=True, env=environment)
        assert done.stdout == b"%d\n" % number


def test_every_function_has_its_manual_page() -> None:
    """Where it is named, declared, and said what it does; test_meson.py has the links."""
    page = (DOCS / "mshare.3").read_text()
    named, declared, described = re.findall(
        r"\.SH (?:NAME|SYNOPSIS|DESCRIPTION)\n(.*?)(?=^\.SH )", page, re.DOTALL | re.MULTILINE
    )
    names = {name.strip() for name in named.partition(r"\-")[0].split(",")}
    assert names == functions()
    for name in names:
        assert re.search(rf"\b{name}\(", declared), name
        plain = name in ("mshare_mmap", "mshare_munmap", "mshare_mprotect")  # as mmap(2)
        plain = plain or name in ("mshare_msync", "mshare_madvise", "mshare_unlock")
        assert plain or re.search(rf"^\.BR {name} \(\)", described, re.MULTILINE), name


def rows(page: Path) -> dict[str, str]:
    """What tables of settings say that a setting usually is."""
    found = re.findall(r"^\| `(\w+)` \| (.*?) \|", page.read_text(), re.MULTILINE)
    return {name: usual.strip("`") for name, usual in found}


def usual(settings: object) -> dict[str, str]:
    """What each of them is if nothing is said, as a configuration file has it."""
    values: dict[str, Any] = msgspec.to_builtins(settings)
    return {
        name: "none" if value is None else msgspec.json.encode(value).decode()
        for name, value in values.items()
    }


def test_the_page_of_the_package_has_all_of_it() -> None:
    """But numbers, and what is as in C anyhow; errors it takes from their module."""
    page = (DOCS / "python-api.md").read_text()
    names = set(libmshare.__all__) - {"MAP_FIXED", "MAP_FIXED_NOREPLACE", "__version__"}
    errors = {name for name in names if isinstance(getattr(libmshare, name), type)}
    errors = {name for name in errors if issubclass(getattr(libmshare, name), Exception)}
    assert len(errors) > 10 and ".. automodule:: libmshare.errors" in page
    for name in names - errors:
        assert re.search(rf"^\.\. auto\w+:: libmshare\.{name}$", page, re.MULTILINE), name


def test_the_page_of_settings_has_all_of_them_and_what_they_are() -> None:
    daemon, limits = usual(config.Config()), usual(config.LimitSettings())
    del limits["user"]
    shown = rows(DOCS / "configuration.md")
    assert shown.pop("limits") == "below"
    del daemon["limits"]
    assert shown == daemon | limits | usual(collapsing.Settings())


def test_the_example_of_the_collapsers_settings_is_taken(tmp_path: Path) -> None:
    (shown,) = [each.text for each in blocks(DOCS / "systemd.md") if each.language == "toml"]
    file = tmp_path / "collapse.toml"
    file.write_text(shown)
    assert collapsing.load(str(file), {}).users == ["postgres"]


def test_options_of_the_daemon_are_in_its_manual_page() -> None:
    page = (DOCS / "msharefsd.8").read_text().replace("\\-", "-")
    done = subprocess.run(
        [Path(sys.executable).parent / "msharefsd", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    options = set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    assert {"--mountpoint", "--purge"} <= options
    for option in options:
        assert option in page, option
