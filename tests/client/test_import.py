"""Where Python finds the package, and where it finds its source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from libmshare import core

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env=environment,
    )


@pytest.fixture
def _no_library_of_the_system() -> None:
    # In a process that has not loaded the package's: the name alone would find that.
    if run("-c", f"import ctypes; ctypes.CDLL('{core.LIBRARY}')").returncode == 0:
        pytest.skip("the system has the library, and the source works with that")


@pytest.mark.usefixtures("_no_library_of_the_system")
@pytest.mark.parametrize("words", [("-c", "import libmshare"), ("-m", "libmshare", "--libs")])
def test_the_source_says_what_to_do_instead(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 1
    assert done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"ImportError: {CHECKOUT}/libmshare is source code")
    for cure in ("make setup", "PYTHONSAFEPATH=1", "python -P"):
        assert cure in last
    assert "OSError" not in done.stderr  # nor what Python would add about it


@pytest.mark.parametrize("program", ["libmshare.cli", "msharefsd"])
def test_a_client_needs_nothing_and_the_daemon_says_what(program: str, tmp_path: Path) -> None:
    bare = f"""
import runpy, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"typer", "rich", "trio", "pyfuse3", "posix_ipc", "msgspec"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
import libmshare
libmshare.Region
sys.argv = ["x", "ls"]
runpy.run_module({program!r}, run_name="__main__")
"""
    done = run("-P", "-c", bare)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(": pip install 'msharefs[daemon]'")
    assert done.stderr.count("\n") == 1


def test_what_it_says_works() -> None:
    done = run("-P", "-c", "import libmshare; print(libmshare.__file__)")
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).is_relative_to(CHECKOUT / "libmshare")
