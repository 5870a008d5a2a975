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
from msharefsd.errors import StartError, StateError, leaves
from msharefsd.front import front, purging
from msharefsd.life.signals import Signals
from msharefsd.linux import priority
from msharefsd.linux.features import UnsupportedError
from msharefsd.mount import mounting
from msharefsd.telemetry import logs

VERSION: Final = version("msharefs")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msharefsd",
        description="Mount msharefs and serve its regions, in the foreground.",
        epilog="Sizes take K, M, G and T.  Whatever ends it, regions stay for the next "
        "msharefsd; --purge removes them.  See msharefsd(8).",
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
        help="collapse what several sharers have into huge pages (yes)",
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
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        help="the lowest level that is logged (info)",
    )
    parser.add_argument(
        "--log-format",
        choices=["text", "json", "journal"],
        help="lines for people, JSON, or journald with fields for region, user and process (text)",
    )
    parser.add_argument(
        "--metrics-listen",
        metavar="WHERE",
        help="serve .metrics by HTTP: a port of loopback, 127.0.0.1:9469, [::1]:9469, or a "
        "socket's path (nowhere)",
    )
    parser.add_argument(
        "--without",
        action="append",
        metavar="FEATURE",
        help="do not use a kernel feature, for testing",
    )
    parser.add_argument(
        "--purge",
        action="store_true",
        help="remove all regions that a msharefsd has left, and end; says what it removes, and "
        "refuses what is in use",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --purge: also what is in use (its next touch is SIGBUS), and what no journal "
        "knows",
    )
    parser.add_argument(
        "--ungraft",
        action="store_true",
        help="show the kernel's /sys/fs again, which a daemon that was killed has left grafted, "
        "and end",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def main(arguments: Sequence[str] | None = None, signals: Signals | None = None) -> int:
    """Run the daemon; the exit code is 0 after a signal, 1 if it failed, 2 for bad settings.

    3 if what was left cannot be used, and somebody has to decide.

    `signals`: who has listened since the program began.
    """
    signals = signals or Signals()
    try:
        return _main(arguments, signals)
    finally:
        signals.close()


def _main(arguments: Sequence[str] | None, signals: Signals) -> int:
    parser = _parser()
    overrides = vars(parser.parse_args(arguments))
    purge, force = overrides.pop("purge", False), overrides.pop("force", False)
    ungraft = overrides.pop("ungraft", False)
    if force and not purge:
        parser.error("--force is for --purge")
    try:
        settings = config.load(overrides.pop("config", None), overrides)
    except config.ConfigError as error:
        print(f"msharefsd: {error}", file=sys.stderr)
        return 2
    logs.set_up(settings.log_level, settings.log_format)
    faulthandler.enable()
    os.umask(os.umask(0o022) | 0o022)  # what we make is never for others to write
    os.chdir("/")  # never keep a file system busy, least of all our own
    code = 0
    try:
        if ungraft:
            _ungraft()
        elif purge:
            priority.give_back()  # nobody waits to be served
            purging.run(settings, force=force)
        else:
            front.run(settings, signals)
    except* (UnsupportedError, StartError) as group:
        for failure in leaves(group):
            logging.getLogger("msharefsd").error("%s", failure)
            code = max(code, 3 if isinstance(failure, StateError) else 1)
    return code


def _ungraft() -> None:
    """Raises StartError."""
    try:
        done = mounting.ungraft()
    except OSError as error:
        raise StartError(f"cannot take back the graft of /sys/fs: {error.strerror}") from error
    logging.getLogger("msharefsd").info(
        "/sys/fs is the kernel's again" if done else "/sys/fs is not grafted"
    )
