"""`meson install`, `ninja uninstall`, and the example of a configuration file."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from building import PROJECT
from conftest import BIN
from pages import functions

from libmshare import core
from msharefsd import config

pytestmark = pytest.mark.shm_only

EXAMPLE = PROJECT / "docs/msharefs.toml"


def run(*words: object, **environment: str) -> str:
    path = f"{BIN}:{os.environ.get('PATH', os.defpath)}"
    done = subprocess.run(
        [str(word) for word in words],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"PATH": path, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_is_installed_and_nothing_stays(tmp_path: Path) -> None:
    build, prefix = tmp_path / "build", tmp_path / "there"
    units = f"-Dsystemd_unit_dir={prefix}/units"
    run("meson", "setup", f"--prefix={prefix}", "--libdir=lib", units, build, PROJECT)
    run("meson", "install", "-C", build)

    # It runs, with no other path to its modules than its own.
    for name in ("mshare", "msharefsd"):
        program = prefix / "bin" / name
        said = run(program, "--version", LD_LIBRARY_PATH=str(prefix / "lib"))
        assert said.split()[0] == name
    for unit in ("system/msharefsd", "system/mshare-collapse", "user/msharefsd"):
        text = (prefix / f"units/{unit}.service").read_text()
        (started,) = re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE)
        assert os.access(started, os.X_OK)
    share = prefix / "share"
    assert {path.stem for path in (share / "man/man3").iterdir()} == functions()
    for page in (share / "man").rglob("*.[138]"):
        assert ".SH NAME" in page.read_text()
    for file in (
        "bash-completion/completions/mshare",
        "bash-completion/completions/msharefsd",
        "zsh/site-functions/_mshare",
        "fish/vendor_completions.d/mshare.fish",
        "doc/msharefs/msharefs.toml",
    ):
        assert (share / file).is_file()
    assert (prefix / "lib" / core.LIBRARY).is_symlink()

    # Its bytecode was there before anybody ran it.
    (site,) = prefix.glob("lib/python*/site-packages")
    sources = {path.relative_to(site) for path in site.rglob("*.py")}
    compiled = {path.relative_to(site) for path in site.rglob("*.pyc")}
    assert len(sources) == len(compiled) > 100
    run("ninja", "-C", build, "uninstall")
    assert not prefix.exists()


def uncommented() -> str:
    """The example with all its settings in force."""
    return re.sub(r"^#(?=[a-z\[])", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_the_example_changes_nothing() -> None:
    assert tomllib.loads(EXAMPLE.read_text()) == {}


def test_the_example_names_all_settings_and_what_they_are() -> None:
    named: dict[str, Any] = tomllib.loads(uncommented())
    users = named["limits"].pop("user")
    assert users == {"postgres": {"memory": "unlimited"}}
    usual = msgspec.to_builtins(config.Config())
    del usual["limits"]["user"]
    # What depends on who runs it, and what has no value that says "none".
    usual |= {
        "mountpoint": "/sys/fs/mshare",
        "run_directory": "/run/msharefs/sys-fs-mshare",
        "region_memory": "64G",
    }
    assert named == usual
