"""The sdist and the wheel: away from the checkout, in Pythons of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from building import PROJECT, script
from conftest import ALIGNMENT, BIN, TESTS, Daemon

pytestmark = [pytest.mark.shm_only, pytest.mark.timeout(1200)]

CHOSEN = ("client/test_letter.py", "client/test_donors.py")
"""Tests of the client that are enough to see that everything came along."""
HELLO = """
from libmshare import Region
with Region.create("hello", "2M") as region:
    region[0] = 7
with Region.attach("hello") as region:
    assert region[0] == 7
    region.unlink()
print(Region.__module__)
"""


@pytest.fixture(scope="module")
def made() -> tuple[Path, Path]:
    """What `make dist` makes of what is committed."""
    if not (PROJECT / ".git").exists():
        pytest.skip("this is no checkout")
    source, wheel = script("dist").split()
    return PROJECT / source, PROJECT / wheel


def pythons() -> list[str]:
    """Those of this machine that are new enough, each once."""
    found: dict[str, str] = {}
    for path in (f"{sys.base_prefix}/bin/python3", *(f"python3.{n}" for n in range(11, 20))):
        if (program := shutil.which(path)) is not None:
            done = subprocess.run(
                [program, "-c", "import sys, ctypes, venv; print(sys.base_prefix)"],
                check=False,
                capture_output=True,
                text=True,
                cwd="/",
            )
            if done.returncode == 0:
                found.setdefault(done.stdout, program)
    return list(found.values())


def environment(python: str, wheel: Path, directory: Path) -> Path:
    """One that has the wheel and nothing else; its interpreter."""
    subprocess.run([python, "-m", "venv", "--without-pip", directory], check=True)
    pip = (BIN / "pip", "--python", directory, "install", "--quiet", "--no-index", "--no-deps")
    subprocess.run([*pip, wheel], check=True, cwd="/")
    return directory / "bin/python"


def test_the_names(made: tuple[Path, Path]) -> None:
    source, wheel = made
    tag = rf"py3-none-manylinux_\d+_\d+_{os.uname().machine}"
    assert re.fullmatch(rf"msharefs-[\d.]+-{tag}\.whl", wheel.name)
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"meson.build", "debian/control", "tests/conftest.py", "Makefile"} <= names
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (metadata,) = (name for name in files if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert {"libmshare/lib/libmshare.so.0", "libmshare/include/mshare.h"} <= set(files)
    pages = {Path(name).name for name in files if "/share/man/man3/" in name}
    assert {"mshare.3", "mshare_attach.3", "mshare_semaphore_post.3"} <= pages
    # A client needs nothing, and no compiler.
    needed = re.findall(r"^Requires-Dist: .*", text, re.MULTILINE)
    assert needed
    assert all("extra ==" in line for line in needed)


@pytest.mark.parametrize("python", pythons())
def test_any_python_takes_it(
    made: tuple[Path, Path], python: str, tmp_path: Path, daemon: Daemon
) -> None:
    interpreter = environment(python, made[1], tmp_path / "venv")
    variables = {"MSHARE_ROOT": str(daemon.mount), "PATH": os.defpath}
    done = subprocess.run(
        [interpreter, "-c", HELLO],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env=variables,
    )
    assert (done.returncode, done.stdout) == (0, "libmshare.region\n"), done.stderr
    words = subprocess.run(
        [interpreter, "-m", "libmshare", "--cflags", "--libs"],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
    ).stdout.split()
    counter = tmp_path / "counter"
    subprocess.run(["cc", "-o", counter, PROJECT / "examples/counter.c", *words], check=True)
    assert ALIGNMENT < 512 << 30
    done = subprocess.run(
        [counter], check=False, capture_output=True, text=True, cwd="/", env=variables
    )
    assert done.stdout.startswith("run 1 "), done.stderr


def test_the_tests_of_the_client_pass_away_from_the_checkout(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    """Those in the sdist, with the wheel, which was made from it."""
    source, wheel = made
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.glob("msharefs-*")
    # Where examples/demo looks for it.
    interpreter = environment(str(Path(sys.base_prefix) / "bin/python3"), wheel, tree / ".venv")
    # The daemon's dependencies and pytest are this environment's; the project is the other's.
    (site,) = (tree / ".venv").glob("lib/python*/site-packages")
    (here,) = Path(sys.prefix).glob("lib/python*/site-packages")
    (site / "more.pth").write_text(f"{here}\n")
    done = subprocess.run(
        [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHOSEN],
        check=False,
        capture_output=True,
        text=True,
        cwd=tree / TESTS.name,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
