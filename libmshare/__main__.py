"""`python -m libmshare --cflags|--libs|--preload|--align`: how to build and run C programs."""

from __future__ import annotations

import argparse

from libmshare import core


def main() -> None:
    """Print what was asked for, on one line."""
    parser = argparse.ArgumentParser(prog="python -m libmshare", description=__doc__)
    parser.add_argument("--cflags", action="store_true", help="flags for the C compiler")
    parser.add_argument("--libs", action="store_true", help="flags for the linker")
    parser.add_argument("--preload", action="store_true", help="the path for LD_PRELOAD")
    parser.add_argument("--align", action="store_true", help="that of the library which aligns")
    wanted = parser.parse_args()
    directory = core.library_directory()
    words: list[str] = []
    if wanted.cflags and directory is not None:
        words.append(f"-I{core.PACKAGE / 'include'}")
    if wanted.libs:
        if directory is None:
            words.append("-lmshare")
        else:
            words += [f"-L{directory}", f"-Wl,-rpath,{directory}", f"-l:{core.LIBRARY}"]
    for asked, name in (
        (wanted.preload, "libmshare-preload.so"),
        (wanted.align, "libmshare-align.so"),
    ):
        if asked:
            words.append(name if directory is None else str(directory / name))
    if not (wanted.cflags or wanted.libs or wanted.preload or wanted.align):
        parser.error("say --cflags, --libs, --preload or --align")
    print(*words)  # noqa: T201 - that is what it is for


main()
