"""Types, as those who use the package have them: from what is installed, whoever checks them."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN, TESTS

import libmshare
from libmshare import Region

CHECKERS = {
    "mypy": [str(BIN / "mypy"), "--strict", f"--python-executable={sys.executable}", "api.py"],
    "pyright": [str(BIN / "pyright"), f"--pythonpath={sys.executable}"],
}


def check(directory: Path, checker: str) -> subprocess.CompletedProcess[str]:
    (directory / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "error"})
    )
    return subprocess.run(
        CHECKERS[checker],
        check=False,
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=100,
        # It comes with node and all that it needs, and fetches nothing.
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "PATH": f"{BIN}:/usr/bin:/bin"},
    )


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_interface_is_checked(tmp_path: Path, checker: str) -> None:
    """What must be an error is one: an ignored error that is none fails, too."""
    shutil.copy(TESTS / "typing" / "api.py", tmp_path)
    done = check(tmp_path, checker)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "api.py").open("a") as file:
        file.write("\nwrong: NDArray[np.int64] = Region.attach('r').ndarray(10)\n")
    done = check(tmp_path, checker)
    assert done.returncode == 1
    assert "float64" in done.stdout


def functions() -> Iterator[Callable[..., Any]]:
    for name in libmshare.__all__:
        what = getattr(libmshare, name)
        if inspect.isclass(what):
            for each in vars(what).values():
                function = getattr(each, "__func__", getattr(each, "fget", each))
                if inspect.isfunction(function) and function.__module__.startswith("libmshare"):
                    yield function
        elif inspect.isfunction(what):
            yield what


def test_types_are_there_at_run_time() -> None:
    """For pydantic, Sphinx and their like."""
    seen = {function.__qualname__ for function in functions()}
    assert {"Region.create", "Region.ndarray", "Region.buf", "Lock.acquire", "alignment"} <= seen
    for function in functions():
        assert "return" in typing.get_type_hints(function), function.__qualname__


def test_what_the_module_has_is_what_it_says() -> None:
    assert set(libmshare.__all__) <= {*dir(libmshare), "__version__", "by_reference"}
    assert libmshare.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        libmshare.nonsense  # type: ignore[attr-defined] # noqa: B018 - it is looked for
    done = subprocess.run(
        [sys.executable, "-c", "import libmshare, sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = set(done.stdout.split())
    assert "libmshare.region" in loaded
    assert not loaded & {"numpy", "importlib.metadata", "multiprocessing", "torch", "trio"}
    assert Region.__module__ == "libmshare.region"
