"""The documents: what they show, and a shell that does what they say."""

from __future__ import annotations

import doctest
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import TESTS
from markdown_it import MarkdownIt

PROJECT = TESTS.parent
DOCS = PROJECT / "docs"
README = PROJECT / "README.md"
_LIKE_IT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    """The first word behind the fence; empty if there is none."""
    words: list[str]
    """The others: the name of a file that it is, or who runs it."""
    text: str
    line: int
    """Where its text begins; the first one is 1."""


def blocks(page: Path) -> list[Block]:
    """Those of a page, in their order, wherever they are in it."""
    found = []
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            assert token.map is not None
            words = token.info.split()
            language, rest = (words[0], words[1:]) if words else ("", [])
            found.append(Block(language, rest, token.content, token.map[0] + 2))
    return found


def functions() -> set[str]:
    """What mshare.h declares: each of these has its manual page."""
    header = (PROJECT / "libmshare/include/mshare.h").read_text()
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    return set(re.findall(r"^\w[\w *]*?\b(mshare\w*)\([^;]*\);", header, re.MULTILINE))


class Said(NamedTuple):
    """A command of a page, and what the page says that it prints."""

    command: str
    output: str
    line: int


def commands(block: Block) -> Iterator[Said]:
    """What is behind `$` and `#` in a console, with the lines below it."""
    command, output, line = "", "", 0
    for number, text in enumerate(block.text.splitlines(), block.line):
        if text.startswith(("$ ", "# ")):
            if command:
                yield Said(command, output, line)
            command, output, line = text[2:], "", number
        elif command.endswith("\\"):
            command += "\n" + text
        else:
            assert command, f"line {number}: a console begins with a command"
            output += text + "\n"
    if command:
        yield Said(command, output, line)


class Shell:
    """A bash that does what a page says, one command after the other, and remembers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, command: str) -> tuple[int, str]:
        """Its status, and what it printed on either output."""
        end = f"end-{uuid.uuid4()}"
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{{ {command}\n}} 2>&1\nprintf '{end} %d\\n' $?\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            before, found, status = line.partition(end)
            lines.append(before)
            if found:
                return int(status), "".join(lines)
        raise AssertionError(f"the shell ended in {command!r}: {''.join(lines)}")

    def follow(self, page: Path, directory: Path, *kind: str) -> int:
        """Do what a page says, from top to bottom: how many commands it has.

        `kind`: what is behind "console" in the blocks that are meant, as who can run them.

        A block with the name of a file becomes that file, in `directory`.  What a page shows
        below a command is what that prints, with "..." for what may be anything; a command
        without that may print what it likes, but has to succeed.
        """
        count = 0
        for block in blocks(page):
            if block.words and block.language in ("c", "cpp", "python", "toml"):
                (directory / block.words[0]).write_text(block.text)
            if block.language != "console" or block.words != list(kind):
                continue
            for said in commands(block):
                status, got = self.run(said.command)
                where = f"{page.name}, line {said.line}: {said.command}\n{got}"
                if said.output:
                    alike = doctest.OutputChecker().check_output(said.output, got, _LIKE_IT)
                    assert alike, f"{where}\nThe page shows:\n{said.output}"
                else:
                    assert status == 0, where
                count += 1
        return count

    def close(self) -> None:
        """End it, and what it left in the background."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("kill $(jobs -p) 2>/dev/null\nexit\n")
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
