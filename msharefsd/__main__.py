"""Where `msharefsd` starts: it takes precedence, and loads the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from msharefsd.linux import priority


def main(arguments: Sequence[str] | None = None) -> int:
    """The daemon, from the command line; see `command.main()`."""
    priority.take_precedence()
    # To load it takes most of the processor time of a start.
    from msharefsd import command

    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
