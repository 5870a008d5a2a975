"""The command line of `msharefsd`."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from msharefsd import config
from msharefsd.errors import StartError, leaves
from msharefsd.front import front
from msharefsd.linux.features import UnsupportedError
from msharefsd.mount.mounting import MountError

VERSION: Final = version("msharefs")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msharefsd",
        description="Mount msharefs and serve its regions, in the foreground.",
        epilog="Sizes take K, M, G and T.  SIGTERM unmounts, SIGHUP leaves all to the next "
        "msharefsd.  See msharefsd(8).",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--mountpoint",
        help="where to mount (/sys/fs/mshare; a user's own: $XDG_RUNTIME_DIR/mshare)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML")
    parser.add_argument(
        "--alignment",
        metavar="SIZE",
        help="what addresses and sizes of regions are multiples of (512G)",
    )
    parser.add_argument(
        "--backing",
        choices=["shm", "hugetlb"],
        help="what holds the pages of regions that do not ask (shm)",
    )
    parser.add_argument(
        "--huge-page", metavar="SIZE", help="the pages of the hugetlb backing: 2M or 1G (2M)"
    )
    parser.add_argument("--region-memory", metavar="SIZE", help="the most memory of a region")
    parser.add_argument(
        "--collapse",
        action=argparse.BooleanOptionalAction,
        help="make huge pages of what several sharers have (yes)",
    )
    parser.add_argument(
        "--run-directory", metavar="DIR", help="for the lock and the like (in /run/msharefs)"
    )
    parser.add_argument(
        "--userfaultfd",
        metavar="WHO",
        help="who may be handed /dev/userfaultfd: all, none, group:NAME; auto: nobody, unless "
        "vm.unprivileged_userfaultfd is 1 (auto)",
    )
    parser.add_argument("--connect-group", metavar="GROUP", help="who may connect (everybody)")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    parser.add_argument(
        "--without",
        action="append",
        metavar="FEATURE",
        help="do without a kernel feature, to test that",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; the exit code is 0 after SIGTERM, 1 if it failed, 2 for bad settings."""
    overrides = vars(_parser().parse_args(arguments))
    try:
        settings = config.load(overrides.pop("config", None), overrides)
    except config.ConfigError as error:
        print(f"msharefsd: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level.upper(), format="msharefsd: %(levelname)s: %(message)s"
    )
    faulthandler.enable()
    os.umask(os.umask(0o022) | 0o022)  # what we make is never for others to write
    os.chdir("/")  # never keep a file system busy, least of all our own
    code = 0
    try:
        front.run(settings)
    except* (UnsupportedError, MountError, StartError) as group:
        for failure in leaves(group):
            logging.getLogger("msharefsd").error("%s", failure)
        code = 1
    return code
