"""TAB in three shells: what regions are called are words, and nothing that a shell runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command, Terminal
from command import mshare_fixture as _mshare  # noqa: F401 - what tests ask for
from command import terminal_fixture as _terminal  # noqa: F401 - the same
from conftest import Daemon, eventually

from libmshare.cli.output import printable

COMPLETIONS = Path(__file__).resolve().parents[2] / "completions"
HOSTILE = "zz;touch pwned; $(touch pwned)`touch pwned`|touch pwned&'\"*~#{a,b}!x [1]"
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], f". {COMPLETIONS}/mshare.bash"),
    "zsh": (
        ["zsh", "-f", "-i"],
        f"fpath=({COMPLETIONS} $fpath); autoload -Uz compinit; compinit -u -D",
    ),
    "fish": (["fish", "--no-config", "-i"], f"source {COMPLETIONS}/mshare.fish"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_name_cannot_run_anything(
    mshare: Command,
    daemon: Daemon,
    terminal: Callable[..., Terminal],
    directory: Path,
    shell: str,
) -> None:
    (daemon.mount / HOSTILE).touch()
    (daemon.mount / "b").touch()
    program, load = SHELLS[shell]
    home = directory / "home"
    home.mkdir()
    there = terminal(program=program, cwd=home, HOME=str(home), columns=200, PS1="$ ")
    there.type(load.encode() + b"; echo lo''aded\r")
    there.displays("\nloaded")
    there.type(b"mshare info zz\t")
    # The beginning of the name as the shell has it, in whatever quotes.
    there.displays("touch", "pwned")
    eventually(lambda: "{a,b}" in plain(there), "the whole name")
    there.type(b"\r")
    eventually(lambda: "name:" in "\n".join(there.screen()), "what is told of it")
    told = "\n".join(there.screen())
    assert printable(HOSTILE) in told
    assert {path.name for path in home.iterdir()}.isdisjoint({"pwned"})


def plain(there: Terminal) -> str:
    return "".join(there.screen()).replace("\\", "").replace("'", "")
