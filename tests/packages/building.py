"""What the project's own scripts build, and a Debian to install it in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from conftest import TESTS
from machine import LackingError, Machine

PROJECT = TESTS.parent
DEBOOTSTRAP = bool(os.environ.get("MSHARE_TEST_DEBOOTSTRAP"))
"""A Debian with nothing but what is said here, instead of this machine's files."""
NEEDED = (
    "systemd,python3,libfuse3-3,fuse3,gcc,libc6-dev,pkg-config,man-db,bash-completion,procps,"
    "python3-starlette,python3-uvicorn"
)
"""What a test of the packages uses, and they depend on, recommend or suggest."""


def script(name: str, *words: object, **environment: str) -> str:
    """Run one of scripts/; what it prints."""
    done = subprocess.run(
        [PROJECT / "scripts" / name, *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def later(package: Path, directory: Path) -> Path:
    """The same package as a version that comes after it."""
    tree = directory / package.stem
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    version = package.name.split("_")[1]
    # Its own, and that of those it needs.
    text = control.read_text().replace(version, f"{version}+later")
    control.write_text(text)
    shutil.rmtree(tree / "DEBIAN/__pycache__", ignore_errors=True)
    made = directory / package.name
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, made],
        check=True,
        capture_output=True,
    )
    return made


class Debian(Machine):
    """A machine that has nothing of the project."""

    packages = Path("/srv/packages")

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, directory)
        if DEBOOTSTRAP:
            self.below = str(self._bootstrapped())

    @staticmethod
    def _bootstrapped() -> Path:
        root = PROJECT / "build/debian"
        made = root / "made"
        if not (made.exists() and made.read_text() == NEEDED):
            if shutil.which("debootstrap") is None:
                raise LackingError("the program debootstrap")
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={NEEDED}", "bookworm", root],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            made.write_text(NEEDED)
        return root

    def _places(self) -> set[str]:
        return set()

    def _install(self) -> None:
        # It asks before services are started, and may say no.
        (self.root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
        (self.root / self.packages.relative_to("/")).mkdir(parents=True)

    def manage(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """dpkg or apt-get in it, as an administrator has them."""
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {"PATH": path, "DEBIAN_FRONTEND": "noninteractive"}
        return self.run(*words, check=check, timeout=300, env=environment)

    def give(self, file: Path, name: str) -> Path:
        """A copy of a file; where it has it."""
        shutil.copy(file, self.root / self.packages.relative_to("/") / name)
        return self.packages / name

    def files(self) -> set[str]:
        """All that lies where a package might put something."""
        places = ("/bin", "/etc", "/lib", "/opt", "/sbin", "/usr", "/var/lib/systemd")
        words = ("-xdev", "-not", "-path", "/etc/ld.so.cache", "-not", "-name", "*.pyc")
        found = self.run("find", "-H", *places, *words).stdout
        return set(found.splitlines())
