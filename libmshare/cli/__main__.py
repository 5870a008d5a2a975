"""The command `mshare`: where it starts and ends.

A command line should start at once, so everything is imported when it is needed.
`python -X importtime -m libmshare.cli ls` shows what that takes.
"""

from __future__ import annotations

import io
import signal
import sys

from libmshare.cli.errors import CommandError
from libmshare.extras import cure


def main() -> None:
    """Run the command; how it ends is in exits.py."""
    # As other tools: end quietly when nobody reads any more.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if sys.argv[1:3] == ["run", "--"] and sys.argv[3:]:
            # What stands before every start of a program does not wait for a parser.
            from libmshare.cli.run import run  # noqa: PLC0415

            run(sys.argv[3:])
        try:
            from libmshare.cli.app import run_app  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise CommandError(
                f"the command needs {error.name}, which libmshare alone does not: {cure('daemon')}"
            ) from None
        sys.exit(run_app())
    except CommandError as failure:
        failure.tell()
        sys.exit(failure.code)


if __name__ == "__main__":
    main()
