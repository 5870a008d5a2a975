"""Where `msharefsd` starts: it takes precedence, and loads the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from msharefsd.life.signals import Signals
from msharefsd.linux import priority


def main(arguments: Sequence[str] | None = None) -> int:
    """The daemon, from the command line; see `command.main()`."""
    signals = Signals()
    priority.take_precedence()
    # To load it takes most of the processor time of a start.
    try:
        from msharefsd import command
    except ModuleNotFoundError as error:
        text = f"msharefsd needs {error.name}, which libmshare alone does not"
        sys.stderr.write(f"{text}: pip install 'msharefs[daemon]'\n")
        return 1
    return command.main(arguments, signals)


if __name__ == "__main__":
    sys.exit(main())
